"""The fine-tuning benchmark: its rival does DDPO right, its figures follow from the histories, its runs go on."""

import importlib
import json
from pathlib import Path

import pytest
import torch

from blend.finetune.config import TrainConfig
from blend.finetune.policy import Transitions
from blend.finetune.rollout import plan_requests
from blend.finetune.trainer import Trainer
from blend.finetune.update import Batch
from blend.model import load_model
from blend.rewards import load_reward

BENCH = Path(__file__).parent / "bench"
PROMPTS = ("A red colored car.", "A blue colored cup.", "A green colored bird.")
SETTINGS = {
    "name": "colour",
    "reward": "colourfulness",
    "prompts": PROMPTS[:2],
    "held_out_prompts": PROMPTS[2:],
    "held_out_images": 2,
    "rank": 2,
    "prompts_per_iteration": 2,
    "images_per_prompt": 3,
    "num_inference_steps": 4,
    "train_steps_per_sample": 2,
    "learning_rate": 1e-3,
    "kl_weight": 0.05,
    "num_workers": 0,
}


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    return importlib.import_module


@pytest.fixture
def make_loop(bench, tiny_sd_dir):
    def make(**changes):
        config = TrainConfig.parse({**SETTINGS, "base_model": str(tiny_sd_dir), **changes})
        return bench("finetuning_parts.ddpo_loop").DDPOLoop(tiny_sd_dir, config, load_reward(config.reward))

    return make


def lora_pairs(trainer, loop):
    """(ours, theirs) for every factor, both [rank, in] or [out, rank]."""
    theirs = dict(loop.unet.named_parameters())
    pairs = []
    for layers in trainer.bank.factors():
        for layer in layers:
            own = trainer.bank._adapters[trainer.config.name][layer]
            pairs.append((own.down, theirs[f"{layer}.lora_A.default.weight"]))
            pairs.append((own.up, theirs[f"{layer}.lora_B.default.weight"]))
    return pairs


def nonzero(loop, strength=0.1):
    """Give the adapter a delta, so that the policy differs from the reference."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in loop.parameters:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * strength)
    return loop


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_the_plain_loop_replays_what_it_sampled(make_loop, guidance_scale):
    loop = nonzero(make_loop(guidance_scale=guidance_scale))
    prompts = PROMPTS[:2] * 3
    whole = loop.epoch(prompts, 6, 4)
    assert whole["ratio_deviation"] < 1e-5
    assert whole["loss"] > 0  # the KL to the reference: advantages average out


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_the_plain_loop_has_the_gradient_of_the_trainer(make_loop, tiny_sd_dir, guidance_scale):
    # a wide clip range: at ratio 1 rounding decides on which side of a narrow one a transition is
    loop = make_loop(guidance_scale=guidance_scale, grad_clip=1e9, clip_range=0.1)
    trainer = Trainer(loop.config, load_model(tiny_sd_dir), load_reward("colourfulness"), PROMPTS[:2], PROMPTS[2:])
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for own, theirs in lora_pairs(trainer, loop):
            own.copy_(torch.randn(own.shape, generator=generator) * 0.2)
            theirs.copy_(own)
    plan = plan_requests(trainer.config, trainer.prompts, 0)
    # later steps are all but deterministic and count in the trainer's KL alone
    steps = [{1: 1.0, 0: 1.0} for _ in plan]
    scored = trainer.sampler.roll_out(plan, steps)
    transitions = Transitions.of(scored, steps)
    prompts = [request.prompt for request in plan]
    gains = torch.linspace(-1, 1, len(plan))

    paths = bench_paths(loop, scored, prompts)
    losses = [loop.losses(paths, torch.full((len(plan),), step), gains) for step in range(2)]
    assert max(float(deviation.max()) for _, deviation in losses) < 1e-4
    sum(loss.sum() for loss, _ in losses).backward()

    text = trainer.model.encode_prompts(prompts)
    batch = Batch(0, plan, transitions, text, gains[transitions.sample], trainer.config.kl_weight)
    trainer.update.run(batch, 0)
    scale = transitions.latents[0].numel() / len(transitions)
    largest = max(float(own.grad.abs().max()) for own, _ in lora_pairs(trainer, loop))
    assert largest > 0
    for own, theirs in lora_pairs(trainer, loop):
        torch.testing.assert_close(own.grad, theirs.grad * scale, rtol=1e-3, atol=1e-4 * largest)


def bench_paths(loop, scored, prompts):
    """What the trainer sampled as the plain loop keeps it."""
    trajectories = scored.trajectories
    embeds, _ = loop.pipeline.encode_prompt(prompts, "cpu", 1, False)
    return importlib.import_module("finetuning_parts.ddpo_loop").Paths(
        torch.stack([path.latents for path in trajectories]),
        torch.stack([path.timesteps for path in trajectories]),
        torch.stack([path.log_probs for path in trajectories]),
        embeds,
        scored.rewards,
    )


def test_the_plain_loop_raises_its_reward(make_loop):
    loop = make_loop(images_per_prompt=8, kl_weight=0.0, learning_rate=3e-2, clip_range=0.2)
    rewards = [loop.epoch(PROMPTS[:2] * 8, 8, 4)["reward_mean"] for _ in range(8)]
    assert sum(rewards[-2:]) > sum(rewards[:2])


def history(seed=0, gains=(0.0, 1.0, 2.0), kls=(0.0, 50.0, 200.0), **last):
    lines = []
    for index, (gain, path_kl) in enumerate(zip(gains, kls, strict=True)):
        line = {
            "iteration": 7 * index,
            "held_out_mean": 0.5 + 0.2 * gain,
            "held_out_std": 0.2 if index == 0 else 0.1,
            "held_out_ci": 0.02,
            "held_out_path_kl": path_kl,
            "held_out_diversity": 0.3 - 0.01 * index,
            "watched": {"alignment": {"mean": 0.4 - 0.1 * index, "std": 0.2, "ci": 0.01}},
        }
        if index:
            lines.append({"iteration": 7 * index - 1, "kl_weight": 0.004, "seconds": 2.0})
            line |= {"kl_weight": 0.005 * index, "seconds": 1.0}
        lines.append(line)
    lines[-1] |= last
    return lines


def test_gains_are_in_base_deviations_with_an_interval_over_seeds(bench):
    gains = bench("finetuning_parts.gains")
    runs = {0: history(gains=(0.0, 1.0, 2.0)), 1: history(gains=(0.0, 1.0, 3.0)), 2: history(gains=(0.0, 1.0, 4.0))}
    figures = gains.gains_of(runs, drawn_mean=0.6)
    half = 4.3027 / 3**0.5  # t of two degrees of freedom, standard deviation 1
    assert figures["mean"] == pytest.approx(3.0)
    assert (figures["low"], figures["high"]) == (pytest.approx(3 - half, abs=1e-3), pytest.approx(3 + half, abs=1e-3))
    assert figures["drawings"] == pytest.approx(0.5)
    assert (figures["base_std"], figures["path_kl"], figures["seconds"]) == (0.2, 200.0, 6.0)
    assert figures["diversity"]["base"] == 0.3
    assert figures["watched"]["alignment"]["mean"] == pytest.approx(-1.0)
    first = figures["per_seed"][0]
    assert (first["seed"], first["gain"], first["iteration"]) == (0, pytest.approx(2.0), 14)
    assert (first["gain_ci"], first["kl_weight"]) == (pytest.approx(0.1 * 2**0.5), 0.01)


def test_the_gain_is_that_of_the_adapter_that_is_published(bench):
    gains = bench("finetuning_parts.gains")
    [one] = gains.gains_of({4: history(stopped="path KL", kept_iteration=7)}, 0.5)["per_seed"]
    assert (one["gain"], one["path_kl"], one["kl_weight"]) == (pytest.approx(1.0), 50.0, 0.005)
    assert one["stopped"] == "path KL"


def test_a_single_seed_has_no_interval_and_older_metrics_have_no_diversity(bench):
    gains = bench("finetuning_parts.gains")
    lines = [{k: v for k, v in line.items() if k not in ("held_out_diversity", "watched")} for line in history()]
    figures = gains.gains_of({0: lines}, 0.5)
    assert (figures["low"], figures["high"]) == (None, None)
    assert not {"diversity", "watched"} & set(figures)


def test_objectives_are_compared_where_all_have_been(bench):
    gains = bench("finetuning_parts.gains")
    compared = gains.compare_objectives(
        {
            "grpo": {0: history(), 1: history(gains=(0.0, 2.0, 3.0))},
            "ddpo": {0: history(kls=(0.0, 40.0, 100.0)), 1: history(kls=(0.0, 40.0, 125.0))},
        }
    )
    assert compared["common_path_kl"] == 100.0
    assert compared["ddpo"]["gain_at_common_kl"]["mean"] == pytest.approx((2.0 + 1 + 60 / 85) / 2)
    assert compared["grpo"]["gain_at_common_kl"]["mean"] == pytest.approx((1 + 1 / 3 + 2 + 1 / 3) / 2)
    assert [point["gain"] for point in compared["grpo"]["paths"][1]] == pytest.approx([0.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="never came to a path KL of 300"):
        gains.gain_at(compared["grpo"]["paths"][0], 300.0)
    picture = bench("finetuning_parts.plot").draw_objectives("compressibility", {"grpo": compared["grpo"]})
    assert picture.startswith(b"\x89PNG")


def test_sections_keep_each_others_figures(bench, tmp_path, monkeypatch):
    figures = bench("figures")
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    monkeypatch.setattr("sys.argv", ["finetuning.py"])
    figures.write_figures("finetuning", {"ratio_vs_ddpo_loop": 2.0, "old": 1}, update=True, section="speed")
    figures.write_figures("finetuning", {"gains": {"colour": {"mean": 1.0}}}, update=True, section="gains")
    path = figures.write_figures("finetuning", {"ratio_vs_ddpo_loop": 3.0}, update=True, section="speed")
    facts = json.loads(path.read_text())
    assert facts["figures"] == {"ratio_vs_ddpo_loop": 3.0, "gains": {"colour": {"mean": 1.0}}}
    assert set(facts["parts"]) == {"finetuning --speed", "finetuning --gains"}
    with pytest.raises(ValueError, match=r"gains: written by finetuning\.py --gains already"):
        figures.write_figures("finetuning", {"gains": 1}, update=True, section="speed")


@pytest.mark.slow
def test_finished_runs_are_only_read(bench, tmp_path, capfd):
    runs = bench("finetuning_parts.runs")
    changes = {"iterations": 1, "prompts_per_iteration": 1, "images_per_prompt": 2, "held_out_images": 2}
    changes |= {"num_inference_steps": 7, "train_steps_per_sample": 3, "rewarded_steps": 2}
    run = runs.Run.of(runs.run_config("colourfulness", 1, **changes), tmp_path)
    other = runs.Run.of(runs.run_config("colourfulness", 2, **changes), tmp_path)
    assert run.directory != other.directory
    first = runs.train(run)
    assert "iteration 1 of 1" in capfd.readouterr().out
    assert runs.train(run) == first
    assert capfd.readouterr().out == ""


def test_the_default_section_is_the_affordable_one(bench, tmp_path):
    options = bench("finetuning").parse(["--work", str(tmp_path / "work")])
    assert options.sections == ["speed"]
    assert options.changes == {}
    options = bench("finetuning").parse(
        ["--gains", "--basis", "alignment", "--iterations", "2", "--work", str(tmp_path)]
    )
    assert (options.sections, options.basis, options.changes) == (["gains"], ["alignment"], {"iterations": 2})


def test_drawings_of_the_prompts_show_what_they_say(bench):
    config = bench("finetuning_parts.runs").run_config("alignment", 0)
    scores = bench("finetuning_parts.drawings").score_drawings(config)
    assert len(scores) == 64
    assert scores.mean() > 0.85
