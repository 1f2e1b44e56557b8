"""How a sampler scores: the same numbers as at once, begun while others are sampled, stopped between two steps."""

import threading

import pytest
import torch

from blend.adapters import AdapterBank
from blend.engine import BlendEngine
from blend.finetune.config import TrainConfig
from blend.finetune.errors import FinetuneError, StoppedError
from blend.finetune.rollout import DECODE_BATCH, Request, Sampler
from blend.finetune.trainer import Trainer
from blend.model import load_model
from blend.rewards import RewardError, load_reward, start_scoring

STEPS = 2
ROWS = 24
REQUESTS = [Request(i, i % 3, f"A cup number {i % 3}.", 100 + i) for i in range(2 * DECODE_BATCH + 5)]
SETTINGS = {
    "name": "colour",
    "reward": "colourfulness",
    "rank": 2,
    "num_inference_steps": STEPS,
    "train_steps_per_sample": 1,
    "eval_guidance_scale": 1.0,
}


class CountingEngine(BlendEngine):
    """An engine that counts its steps."""

    steps = 0

    def step(self):
        self.steps += 1
        return super().step()


class Colour:
    """Colourfulness, for rewards that differ in one thing."""

    name, version, range, differentiable = "colour", "1", (0.0, 1.1), False
    plain = load_reward("colourfulness")

    def __call__(self, images, prompts):
        return self.plain(images, prompts)


class LateColour(Colour):
    """Colourfulness that is computed when it is asked for; notes at which engine step each batch came."""

    def __init__(self, engine):
        self.engine, self.submitted_at, self.finished_at, self.sizes = engine, [], [], []

    def submit(self, images, prompts):
        self.submitted_at.append(self.engine.steps)
        self.sizes.append(len(images))

        def finish():
            self.finished_at.append(self.engine.steps)
            return self(images, prompts)

        return finish


class FailingColour(Colour):
    """Scores no prompt about cup 1."""

    def __call__(self, images, prompts):
        if "A cup number 1." in prompts:
            raise ZeroDivisionError("no cup")
        return super().__call__(images, prompts)


class LateFailingColour(FailingColour):
    """Fails where the scores are asked for."""

    def submit(self, images, prompts):
        return lambda: self(images, prompts)


@pytest.fixture(scope="module")
def config():
    return TrainConfig.parse(SETTINGS)


@pytest.fixture(scope="module")
def tuned(tiny_sd_dir, config):
    """The tiny model and a bank whose trainable adapter is not the zero it starts from."""
    model = load_model(tiny_sd_dir)
    bank = AdapterBank(model.unet)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in bank.add_trainable(config.name, rank=config.rank, seed=0):
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model, bank


@pytest.fixture
def engine(tuned):
    return CountingEngine(*tuned, max_rows=ROWS, tile_rows=ROWS)


def test_scores_are_those_of_all_images_at_once(config, engine):
    scored = Sampler(config, engine, load_reward("colourfulness"), {"size": load_reward("compressibility")}).evaluate(
        REQUESTS
    )
    outputs = engine.run([output.sample for output in scored.outputs])
    images = engine.decode([output.latents for output in outputs])
    prompts = [request.prompt for request in REQUESTS]
    assert [output.sample.seed for output in scored.outputs] == [request.seed for request in REQUESTS]
    assert torch.equal(scored.images, images)
    assert torch.equal(scored.rewards, load_reward("colourfulness")(images, prompts))
    assert scored.watched.keys() == {"size"}
    assert torch.equal(scored.watched["size"], load_reward("compressibility")(images, prompts))
    assert all(output.path_kl is not None for output in scored.outputs)


def test_rollouts_keep_paths_but_neither_images_nor_watched_rewards(config, engine):
    sampler = Sampler(config, engine, Colour(), {"brightness": load_reward("brightness")})
    scored = sampler.roll_out(REQUESTS[:5])
    assert len(scored.trajectories) == 5
    assert scored.images.numel() == 0
    assert scored.watched == {}
    images = engine.decode([path.latents[-1] for path in scored.trajectories])
    assert torch.equal(scored.rewards, Colour()(images, [request.prompt for request in REQUESTS[:5]]))


def test_a_reward_elsewhere_scores_while_others_are_sampled(config, engine):
    reward = LateColour(engine)
    scored = Sampler(config, engine, reward).roll_out(REQUESTS)
    waves = -(-len(REQUESTS) // ROWS)
    assert engine.steps == waves * STEPS
    assert reward.sizes == [DECODE_BATCH, DECODE_BATCH, 5]
    # a batch is sent when the wave ends that fills it; nobody waits for scores before the last step
    assert reward.submitted_at == [STEPS * 2, STEPS * 3, STEPS * waves]
    assert reward.finished_at == [engine.steps] * 3
    assert torch.equal(scored.rewards, Sampler(config, engine, Colour()).roll_out(REQUESTS).rewards)


def test_a_run_can_be_stopped_between_two_steps(config, engine):
    reward = LateColour(engine)
    sampler = Sampler(config, engine, reward)
    sampler.should_stop = lambda: engine.steps == 5
    with pytest.raises(StoppedError, match="'colour' was stopped while sampling: run it again to resume"):
        sampler.roll_out(REQUESTS)
    assert engine.steps == 5
    assert engine.idle
    assert (len(reward.submitted_at), reward.finished_at) == (1, [])
    sampler.should_stop = lambda: False
    assert sampler.roll_out(REQUESTS).rewards.isfinite().all()


def test_a_run_can_be_stopped_while_a_reward_never_answers(config, engine):
    class Silent(Colour):
        def submit(self, images, prompts):
            return threading.Event().wait

    asked = []
    sampler = Sampler(config, engine, Silent())
    sampler.should_stop = lambda: asked.append(engine.idle) or sum(asked) == 2
    with pytest.raises(StoppedError, match="'colour' was stopped while sampling"):
        sampler.roll_out(REQUESTS[:2])
    assert engine.idle


def test_a_bad_request_leaves_the_engine_idle_before_any_work(config, engine):
    with pytest.raises(ValueError, match="prompt"):
        Sampler(config, engine, Colour()).roll_out([*REQUESTS[:3], Request(3, 0, None, 1)])
    assert engine.idle
    assert engine.steps == 0


@pytest.mark.parametrize("reward", [FailingColour(), LateFailingColour()])
def test_an_error_of_a_reward_names_it_the_prompts_and_the_seeds(config, engine, reward):
    with pytest.raises(FinetuneError) as caught:
        Sampler(config, engine, reward).roll_out(REQUESTS[:2])
    assert str(caught.value) == (
        "the reward 'colour' failed on 2 images, first 'A cup number 0.' (seed 100); 'A cup number 1.' (seed 101): "
        "ZeroDivisionError: no cup"
    )
    assert engine.idle


def test_scores_of_another_shape_are_refused(engine):
    class Twice(Colour):
        def __call__(self, images, prompts):
            return super().__call__(images, prompts).repeat(2)

    images = torch.rand(3, 3, 8, 8)
    with pytest.raises(RewardError, match=r"colour gave scores of shape \(6,\) for 3 images"):
        start_scoring(Twice(), images, ["a"] * 3)


def test_a_sample_that_failed_has_no_score_and_stops_nobody(tiny_sd_dir, config):
    model = load_model(tiny_sd_dir)
    bank = AdapterBank(model.unet)
    with torch.no_grad():
        for parameter in bank.add_trainable(config.name, rank=2, seed=0):
            parameter.fill_(float("nan"))
    scored = Sampler(config, BlendEngine(model, bank), Colour()).roll_out(REQUESTS[:2])
    assert scored.rewards.isnan().all()
    assert all(output.error is not None for output in scored.outputs)


def test_scores_are_the_same_bits_wherever_they_are_computed(tiny_sd_dir):
    """A whole iteration: what is learnt does not depend on when scores come."""
    config = TrainConfig.parse({**SETTINGS, "prompts_per_iteration": 2, "images_per_prompt": 2, "held_out_images": 2})

    def train(reward):
        trainer = Trainer(config, load_model(tiny_sd_dir), reward, ("A red cup.", "A car."), ("A bird.",))
        if isinstance(reward, LateColour):
            reward.engine = trainer.sampler.engine = CountingEngine(trainer.model, trainer.bank)
        trainer.evaluate()
        trainer.iterate()
        return [parameter.detach().clone() for parameter in trainer.parameters]

    for now, later in zip(train(Colour()), train(LateColour(None)), strict=True):
        assert torch.equal(now, later)
