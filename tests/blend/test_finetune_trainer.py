"""The trainer on a tiny model of the real classes: exact replay, exact resume, worker slices, KL, and what stops it."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from blend.finetune.checkpoint import ADAPTER_FILE, CheckpointFolder, read_state
from blend.finetune.config import TrainConfig
from blend.finetune.errors import FinetuneError, NonFiniteError, ResumeError, StoppedError
from blend.finetune.held_out import published
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
    def make(reward=None, workgroup=None, base_model=tiny_sd_dir, watched=None, **changes):
        config = TrainConfig.parse({**SETTINGS, "base_model": str(base_model), **changes})
        reward = reward or load_reward(config.reward)
        return Trainer(config, load_model(base_model), reward, TRAIN, HELD_OUT, workgroup, watched=watched)

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
def test_references_of_the_rollouts_sum_to_the_engines_path_kl(make_trainer, guidance_scale):
    trainer = nonzero(make_trainer(guidance_scale=guidance_scale, eval_guidance_scale=guidance_scale, eta=0.7))
    requests = plan_requests(trainer.config, TRAIN, 0)
    everything = trainer.policy.random_steps()
    scored = trainer.sampler.roll_out(requests, [everything] * len(requests))
    transitions = Transitions.of(scored, [dict.fromkeys(everything, 1.0) for _ in requests])
    text = trainer.model.encode_prompts([request.prompt for request in requests]).rows(transitions.text)
    with torch.no_grad():
        mean, std = trainer.policy.transition(transitions, text)
    divergence = transition_kl(mean, transitions.base_means, std)
    torch.testing.assert_close(divergence, transitions.kl, rtol=1e-3, atol=1e-5)
    measured = trainer.sampler.evaluate(requests)
    assert measured.outputs[0].path_kl > 0
    torch.testing.assert_close(
        divergence.view(len(requests), -1).sum(1),
        torch.tensor([output.path_kl for output in measured.outputs]),
        rtol=1e-3,
        atol=1e-5,
    )


def test_references_are_the_transitions_of_the_base(make_trainer):
    plain, tuned = make_trainer(), nonzero(make_trainer())
    requests = plan_requests(plain.config, TRAIN, 0)
    scored = tuned.sampler.roll_out(requests, [(0, 2)] * len(requests))
    part = Transitions.of(scored, [{0: 1.0, 2: 1.0} for _ in requests])
    text = plain.model.encode_prompts([request.prompt for request in requests]).rows(part.text)
    with torch.no_grad():
        torch.testing.assert_close(part.base_means, plain.policy.transition(part, text)[0], rtol=1e-4, atol=1e-5)
        changed = tuned.policy.transition(part, text)[0] - part.base_means
    assert changed.abs().max() > 1e-3


def test_path_kl_of_random_steps_is_that_of_all_steps_on_average(make_trainer):
    trainer = nonzero(make_trainer(train_steps_per_sample=1, num_inference_steps=4, prompts_per_iteration=1))
    trainer.evaluate()
    estimates = []
    for step in trainer.policy.random_steps():
        chosen = {step: float(len(trainer.policy.random_steps()))}
        requests = plan_requests(trainer.config, TRAIN, 0)
        scored = trainer.sampler.roll_out(requests, [chosen] * len(requests))
        estimates.append(trainer._path_kl(Transitions.of(scored, [chosen] * len(requests)), len(requests)))
    every = dict.fromkeys(trainer.policy.random_steps(), 1.0)
    scored = trainer.sampler.roll_out(requests, [every] * len(requests))
    whole = trainer._path_kl(Transitions.of(scored, [every] * len(requests)), len(requests))
    assert sum(estimates) / len(estimates) == pytest.approx(whole, rel=1e-4)


def parameters_of(trainer):
    return [parameter.detach().clone() for parameter in trainer.parameters]


@pytest.mark.parametrize("objective", ["dpok", "ddpo", "grpo"])
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(make_trainer, tmp_path, objective):
    changes = {"objective": objective, "updates_per_iteration": 2, "kl_target": 0.5}
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


def gradient_of(trainer):
    """The first iteration's gradient, one vector."""
    trainer.evaluate()
    trainer.update.optimizer = torch.optim.SGD(trainer.parameters, lr=0.0)
    trainer.iterate()
    return torch.cat([parameter.grad.flatten() for parameter in trainer.parameters])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reduced_precision_keeps_the_adapter_in_float32_and_its_gradient(tiny_sd_dir, dtype):
    gradients = []
    for used in (torch.float32, dtype):
        config = TrainConfig.parse({**SETTINGS, "base_model": str(tiny_sd_dir), "grad_clip": 1e9})
        trainer = Trainer(config, load_model(tiny_sd_dir, dtype=used), Redness(), TRAIN, HELD_OUT)
        gradients.append(gradient_of(nonzero(trainer)))
    assert trainer.iterate()["ratio_deviation"] < 1e-2
    assert {parameter.dtype for parameter in trainer.parameters} == {torch.float32}
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.95


def test_gradient_checkpointing_gives_the_same_gradient(make_trainer):
    plain, recomputed = nonzero(make_trainer()), nonzero(make_trainer(gradient_checkpointing=True))
    runs, gradients = [], []
    for trainer in (plain, recomputed):
        count: list[None] = []
        layer = trainer.model.unet.mid_block.attentions[0].transformer_blocks[0].attn1
        layer.register_forward_pre_hook(lambda *_, count=count: count.append(None))
        gradients.append(gradient_of(trainer))
        runs.append(len(count))
    assert runs[1] > runs[0]
    assert gradients[0].abs().max() > 1e-4
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)


def test_a_stop_between_micro_batches_leaves_the_adapter_as_it_was(make_trainer):
    trainer = nonzero(make_trainer(micro_batch_rows=2))
    trainer.evaluate()
    before, learning = parameters_of(trainer), []
    unet = trainer.model.unet
    unet.register_forward_pre_hook(lambda *_: learning.append(None) if torch.is_grad_enabled() else None)
    trainer.should_stop = lambda: len(learning) == 2
    with pytest.raises(StoppedError, match="iteration 1"):
        trainer.iterate()
    assert len(learning) == 2
    for old, new in zip(before, trainer.parameters, strict=True):
        assert torch.equal(old, new)


def test_kl_target_holds_the_held_out_path_kl(make_trainer):
    """Without it the same run goes several times as far."""
    kl = {}
    for target in (None, 2.0):
        trainer = make_trainer(
            Redness(), kl_weight=1e-4, kl_target=target, iterations=20, eval_every=5, learning_rate=0.01
        )
        run_training(trainer, save=lambda trainer: None)
        kl[target] = trainer.history[-1]["held_out_path_kl"]
    assert kl[2.0] < 4.0 < 8.0 < kl[None]
    assert trainer.control.weight > 1e-4


def test_an_early_stop_goes_back_to_the_adapter_that_broke_no_rule(make_trainer, tmp_path):
    changes = {"guard": {"kl": 0.5, "watch": {"compressibility": 50.0}}, "eval_every": 1, "kl_weight": 1e-4}
    watched = {"compressibility": load_reward("compressibility")}
    trainer = make_trainer(Redness(), watched=watched, learning_rate=0.004, iterations=20, **changes)
    seen = {}

    def save(trainer):
        seen[trainer.iteration] = (parameters_of(trainer), trainer.state_dict())

    run_training(trainer, save=save)
    last = trainer.history[-1]
    assert trainer.finished
    assert 1 < last["iteration"] < 20
    assert last["stopped"].startswith("path KL")
    assert last["kept_iteration"] == last["iteration"] - 1
    assert published(trainer.history)["held_out_path_kl"] <= 0.5 < last["held_out_path_kl"]
    assert set(last["watched"]) == {"compressibility"}
    for kept, now in zip(seen[last["kept_iteration"]][0], trainer.parameters, strict=True):
        assert torch.equal(kept, now)
    assert sorted(trainer.sheets) == list(range(last["iteration"] + 1))

    again = make_trainer(Redness(), watched=watched, learning_rate=0.004, iterations=20, **changes)
    again.load_state_dict(seen[last["iteration"]][1])
    run_training(again, save=save, on_metrics=lambda metrics: pytest.fail("trained on"))
    assert again.iteration == last["iteration"]


def test_a_rule_broken_at_once_has_nothing_to_go_back_to(make_trainer):
    trainer = make_trainer(Redness(), guard={"kl": 1e-6}, eval_every=1, learning_rate=0.05)
    with pytest.raises(FinetuneError, match=r"first evaluation, in iteration \d \(path KL"):
        run_training(trainer, save=lambda trainer: None)


@pytest.mark.parametrize(("rows", "guidance_scale"), [(3, 1.0), (4, 3.0)])
def test_micro_batches_give_the_gradient_of_the_whole(make_trainer, rows, guidance_scale):
    whole = nonzero(make_trainer(guidance_scale=guidance_scale))
    parts = nonzero(make_trainer(guidance_scale=guidance_scale, micro_batch_rows=rows))
    for trainer in (whole, parts):
        trainer.evaluate()
        trainer.update.optimizer = torch.optim.SGD(trainer.parameters, lr=1.0)
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
