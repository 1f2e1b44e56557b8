"""The trainer on a tiny model of the real classes: exact replay, exact resume, worker slices, KL, and what stops it."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from blend.finetune.checkpoint import ADAPTER_FILE, CheckpointFolder, read_state
from blend.finetune.config import TrainConfig
from blend.finetune.errors import NonFiniteError, ResumeError, StoppedError
from blend.finetune.loop import run_training
from blend.finetune.objectives import transition_kl
from blend.finetune.policy import Transitions
from blend.finetune.rollout import plan_requests
from blend.finetune.trainer import Trainer
from blend.model import load_model
from blend.rewards import load_reward

TRAIN = ("A red colored car.", "A blue colored cup.", "A green colored bird.")
HELD_OUT = ("A red colored cup.", "A green colored car.")
SETTINGS = {
    "name": "colour",
    "reward": "colourfulness",
    "prompts": TRAIN,
    "held_out_prompts": HELD_OUT,
    "held_out_images": 4,
    "rank": 2,
    "iterations": 3,
    "prompts_per_iteration": 2,
    "images_per_prompt": 3,
    "num_inference_steps": 4,
    "train_steps_per_sample": 2,
    "eval_every": 2,
    "learning_rate": 1e-2,
    "num_workers": 0,
}


class Redness:
    """Mean of red minus the rest: a reward that an untrained model can move."""

    name, version, range, differentiable = "redness", "1", (-1.0, 1.0), True

    def __call__(self, images, prompts):
        return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))


class Broken(Redness):
    """NaN for one prompt."""

    def __call__(self, images, prompts):
        rewards = super().__call__(images, prompts)
        return torch.where(torch.tensor([prompt == TRAIN[0] for prompt in prompts]), torch.nan, rewards)


@pytest.fixture
def make_trainer(tiny_sd_dir: Path):
    def make(reward=None, workgroup=None, base_model=tiny_sd_dir, **changes):
        config = TrainConfig.parse({**SETTINGS, "base_model": str(base_model), **changes})
        reward = reward or load_reward(config.reward)
        return Trainer(config, load_model(base_model), reward, TRAIN, HELD_OUT, workgroup)

    return make


def nonzero(trainer, seed=7):
    """Give the adapter a delta, so that the policy differs from the base."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainer.parameters:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return trainer


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_replay_gives_ratio_one_before_the_first_update(make_trainer, guidance_scale):
    trainer = nonzero(make_trainer(guidance_scale=guidance_scale, micro_batch_rows=5))
    trainer.evaluate()
    assert trainer.iterate()["ratio_deviation"] < 1e-5


@pytest.mark.parametrize("objective", ["dpok", "grpo"])
def test_sdxl_is_trained_and_replayed_with_its_sizes_and_pooled_text(make_trainer, tiny_sdxl_dir, objective):
    trainer = nonzero(make_trainer(base_model=tiny_sdxl_dir, guidance_scale=3.0, objective=objective))
    trainer.evaluate()
    before = parameters_of(trainer)
    assert trainer.iterate()["ratio_deviation"] < 1e-5
    assert not any(torch.equal(old, new) for old, new in zip(before, trainer.parameters, strict=True))


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_kl_of_the_policy_sums_to_the_engines_path_kl(make_trainer, guidance_scale):
    trainer = nonzero(make_trainer(guidance_scale=guidance_scale, eval_guidance_scale=guidance_scale, eta=0.7))
    requests = plan_requests(trainer.config, TRAIN, 0)
    scored = trainer.sampler.roll_out(requests)
    path = scored.trajectories[0]
    everything = list(range(len(path.timesteps)))
    transitions = Transitions.of(scored, [dict.fromkeys(everything, 1.0) for _ in requests])
    text = trainer.model.encode_prompts([request.prompt for request in requests]).rows(transitions.text)
    with torch.no_grad():
        mean, std = trainer.policy.transition(transitions, text, mix=1.0)
        base_mean, _ = trainer.policy.transition(transitions, text, mix=0.0)
    divergence = transition_kl(mean, base_mean, std)
    measured = trainer.sampler.evaluate(requests)
    assert measured.outputs[0].path_kl > 0
    torch.testing.assert_close(
        divergence.view(len(requests), -1).sum(1),
        torch.tensor([output.path_kl for output in measured.outputs]),
        rtol=1e-3,
        atol=1e-5,
    )


def test_base_rows_ignore_the_adapter(make_trainer):
    plain, tuned = make_trainer(), nonzero(make_trainer())
    scored = plain.sampler.roll_out(plan_requests(plain.config, TRAIN, 0))
    part = Transitions.of(scored, [{0: 1.0, 1: 1.0} for _ in scored.requests])
    text = plain.model.encode_prompts([request.prompt for request in scored.requests]).rows(part.text)
    with torch.no_grad():
        torch.testing.assert_close(
            tuned.policy.transition(part, text, mix=0.0)[0], plain.policy.transition(part, text, mix=1.0)[0]
        )
        changed = tuned.policy.transition(part, text, mix=1.0)[0] - plain.policy.transition(part, text, mix=1.0)[0]
    assert changed.abs().max() > 1e-3


def parameters_of(trainer):
    return [parameter.detach().clone() for parameter in trainer.parameters]


@pytest.mark.parametrize("objective", ["dpok", "ddpo", "grpo"])
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(make_trainer, tmp_path, objective):
    changes = {"objective": objective, "updates_per_iteration": 2}
    whole = make_trainer(**changes)
    run_training(whole, save=CheckpointFolder(tmp_path / "whole").save)

    folder = CheckpointFolder(tmp_path / "parts")
    stopped = make_trainer(**changes)
    with pytest.raises(StoppedError, match="after iteration 2"):
        run_training(stopped, save=folder.save, should_stop=lambda: stopped.iteration == 2)
    resumed = make_trainer(**changes)
    resumed.load_state_dict(read_state(folder.latest()))
    assert resumed.iteration == 2
    run_training(resumed, save=folder.save)

    for one, other in zip(parameters_of(whole), parameters_of(resumed), strict=True):
        assert torch.equal(one, other)
    saved = [load_file(tmp_path / part / "iteration_000003" / ADAPTER_FILE) for part in ("whole", "parts")]
    assert saved[0].keys() == saved[1].keys()
    assert all(torch.equal(saved[0][key], saved[1][key]) for key in saved[0])
    clock = {"seconds", "rollout_seconds", "images_per_second"}
    lines = [[{k: v for k, v in m.items() if k not in clock} for m in t.history] for t in (whole, resumed)]
    assert lines[0] == lines[1]


def test_checkpoint_of_other_settings_is_refused(make_trainer, tmp_path):
    folder = CheckpointFolder(tmp_path)
    folder.save(make_trainer())
    with pytest.raises(ResumeError, match=r"kl_weight: 0\.01 -> 0\.5"):
        make_trainer(kl_weight=0.5).load_state_dict(read_state(folder.latest()))


def test_checkpoints_appear_whole_and_old_ones_go(make_trainer, tmp_path):
    folder = CheckpointFolder(tmp_path)
    run_training(make_trainer(), save=folder.save)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iteration_000002", "iteration_000003"]
    (tmp_path / ".partial_000004").mkdir()
    assert folder.latest() == tmp_path / "iteration_000003"


def test_checkpoint_every_skips_iterations_but_not_the_last(make_trainer):
    saved = []
    run_training(make_trainer(checkpoint_every=2), save=lambda trainer: saved.append(trainer.iteration))
    assert saved == [2, 3]


def test_eval_every_and_guidance_of_the_evaluation(make_trainer):
    trainer, guided = make_trainer(eval_every=1), make_trainer(eval_guidance_scale=7.0)
    run_training(trainer, save=lambda trainer: None)
    assert [m["iteration"] for m in trainer.history if "held_out_mean" in m] == [0, 1, 2, 3]
    assert guided.evaluate()["held_out_mean"] != trainer.history[0]["held_out_mean"]


def test_gradient_is_clipped(make_trainer):
    trainer = nonzero(make_trainer(grad_clip=1e-3))
    trainer.evaluate()
    metrics = trainer.iterate()
    norm = torch.stack([parameter.grad.norm() for parameter in trainer.parameters]).norm()
    assert metrics["grad_norm"] > 1e-3
    assert norm == pytest.approx(1e-3, rel=1e-3)


def test_later_updates_leave_ratio_one_and_the_clip_range_counts_them(make_trainer):
    clipped = {}
    for clip_range in (1e-9, 10.0):
        trainer = make_trainer(updates_per_iteration=2, clip_range=clip_range, learning_rate=0.1)
        trainer.evaluate()
        clipped[clip_range] = trainer.iterate()["clipped"]
    assert clipped[1e-9] > 0
    assert clipped[10.0] == 0


def test_reduced_precision_keeps_the_adapter_in_float32(tiny_sd_dir):
    config = TrainConfig.parse({**SETTINGS, "base_model": str(tiny_sd_dir), "dtype": "bfloat16"})
    model = load_model(tiny_sd_dir, dtype=torch.bfloat16)
    trainer = Trainer(config, model, load_reward(config.reward), TRAIN, HELD_OUT)
    trainer.evaluate()
    assert trainer.iterate()["ratio_deviation"] < 1e-2
    assert {parameter.dtype for parameter in trainer.parameters} == {torch.float32}


@pytest.mark.parametrize(("rows", "guidance_scale"), [(3, 1.0), (4, 3.0)])
def test_micro_batches_give_the_gradient_of_the_whole(make_trainer, rows, guidance_scale):
    whole = nonzero(make_trainer(guidance_scale=guidance_scale))
    parts = nonzero(make_trainer(guidance_scale=guidance_scale, micro_batch_rows=rows))
    for trainer in (whole, parts):
        trainer.evaluate()
        trainer.optimizer = torch.optim.SGD(trainer.parameters, lr=1.0)
        trainer.iterate()
    largest = max(parameter.grad.abs().max().item() for parameter in whole.parameters)
    assert largest > 1e-4
    for one, other in zip(whole.parameters, parts.parameters, strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-3 * largest, rtol=0)


@pytest.mark.parametrize("objective", ["dpok", "ddpo", "grpo"])
def test_reward_rises(make_trainer, objective):
    trainer = make_trainer(
        Redness(),
        objective=objective,
        kl_weight=0.0,
        iterations=8,
        images_per_prompt=12,
        held_out_images=24,
        learning_rate=0.1,
        train_steps_per_sample=3,
        eval_every=50,
        eval_guidance_scale=1.0,
    )
    run_training(trainer, save=lambda trainer: None)
    first, last = trainer.history[0], trainer.history[-1]
    assert last["held_out_mean"] - first["held_out_mean"] > first["held_out_std"]
    assert last["held_out_path_kl"] > 0


def test_kl_weight_holds_the_policy_near_the_base(make_trainer):
    kl = {}
    for kl_weight in (0.0, 0.5):
        trainer = make_trainer(Redness(), kl_weight=kl_weight, iterations=6, eval_every=50, learning_rate=0.1)
        run_training(trainer, save=lambda trainer: None)
        kl[kl_weight] = trainer.history[-1]["held_out_path_kl"]
    assert kl[0.5] < 0.5 * kl[0.0]


def test_nan_reward_stops_with_prompt_and_seed_and_keeps_the_checkpoint(make_trainer, tmp_path):
    folder = CheckpointFolder(tmp_path)
    trainer = make_trainer(Redness(), iterations=2)
    run_training(trainer, save=folder.save)
    trainer.sampler.reward = Broken()
    trainer.config = trainer.config.model_copy(update={"iterations": 9})
    before = copy.deepcopy(folder.latest())
    with pytest.raises(NonFiniteError, match=r"iteration \d: .*'A red colored car\.' \(seed \d+\)"):
        run_training(trainer, save=folder.save)
    assert folder.latest() is not None
    assert folder.latest() >= before
    assert all(tensor.isfinite().all() for tensor in read_state(folder.latest())["parameters"])


def test_nan_loss_stops_before_the_step(make_trainer):
    trainer = make_trainer(iterations=2)
    trainer.evaluate()
    trainer.base = (0.0, float("nan"))
    before = parameters_of(trainer)
    with pytest.raises(NonFiniteError, match=r"step \d of '.*' \(seed \d+\)"):
        trainer.iterate()
    for one, other in zip(before, parameters_of(trainer), strict=True):
        assert torch.equal(one, other)
