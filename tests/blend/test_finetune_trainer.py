"""The trainer on a tiny model of the real classes: exact replay, exact resume, worker slices and gradients."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from blend.finetune.checkpoint import ADAPTER_FILE, CheckpointFolder, read_state
from blend.finetune.config import TrainConfig
from blend.finetune.errors import ConfigError, FinetuneError, ResumeError, StoppedError
from blend.finetune.loop import run_training
from blend.finetune.objectives import transition_kl
from blend.finetune.policy import Transitions
from blend.finetune.rollout import plan_requests
from blend.finetune.trainer import Trainer
from blend.model import load_model
from blend.rewards import load_reward

TRAIN = ("A red colored car.", "A blue colored cup.", "A green colored bird.")


def test_base_without_attention_is_refused_by_name(tiny_sd_dir):
    model = load_model(tiny_sd_dir)
    model.unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=32,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        mid_block_type=None,
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    config = TrainConfig(name="colour", reward="colourfulness", base_model="convolutions")
    with pytest.raises(ConfigError, match=r"base_model is 'convolutions', which cannot be tuned: no layer .*'to_q'"):
        Trainer(config, model, load_reward("colourfulness"), TRAIN, ("A car.",))


@pytest.mark.parametrize("when", ["evaluate", "iterate"])
def test_memory_that_runs_out_is_told_with_what_helps(make_trainer, monkeypatch, when):
    trainer = make_trainer(micro_batch_rows=6)
    if when == "iterate":
        trainer.evaluate()

    def fail(*_inputs, **_options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")

    monkeypatch.setattr(trainer.model.unet, "forward", fail)
    with pytest.raises(FinetuneError, match=r"with micro_batch_rows 6: lower it.* 20 MiB"):
        getattr(trainer, when)()


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
def test_reduced_precision_keeps_the_adapter_in_float32_and_its_gradient(make_trainer, redness, dtype):
    gradients = []
    for precision in (torch.float32, dtype):
        trainer = nonzero(make_trainer(redness, precision=precision, grad_clip=1e9))
        gradients.append(gradient_of(trainer))
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
