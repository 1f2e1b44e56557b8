"""Pre-training: resume, export to diffusers' format, the judge, and what the shipped parts must reach."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from blend.sprites import build
from blend.sprites.codec import build_codec, train_codec
from blend.sprites.export import draw_sheet, load_base, sample
from blend.sprites.judge import Judge, load_judge, measure_accuracy
from blend.sprites.pretrain import Pretrainer, PretrainPlan, learning_rate_factor
from blend.sprites.tokenizer import MAX_TOKENS
from blend.sprites.vision import load_half, save_half

PLAN = PretrainPlan(codec_steps=2, decoder_steps=2, scenes=64, steps=6, batch=4)


def _silent(stage: str, done: int, total: int, value: float) -> None:
    pass


def _trainer(work: Path, plan: PretrainPlan = PLAN) -> Pretrainer:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(32, 4, 16, 16, generator=generator).half()
    tokens = torch.randint(0, 600, (32, MAX_TOKENS), generator=generator)
    work.mkdir(exist_ok=True)
    return Pretrainer(plan, work, latents, tokens)


def test_a_stopped_run_goes_on_to_the_same_weights(tmp_path):
    whole = _trainer(tmp_path / "whole")
    whole.run(_silent)

    class Stop(Exception):
        pass

    def stop_after_five(stage: str, done: int, total: int, value: float) -> None:
        if done == 5:
            raise Stop

    with pytest.raises(Stop):
        _trainer(tmp_path / "cut").run(stop_after_five, checkpoint_every=3)
    resumed = _trainer(tmp_path / "cut")
    steps: list[int] = []
    resumed.run(lambda stage, done, total, value: steps.append(done))
    assert steps == [4, 5, 6]
    for one, other in zip(whole.ema, resumed.ema, strict=True):
        assert torch.equal(one, other)


def test_learning_rate_warms_up_holds_and_falls_to_zero():
    plan = PretrainPlan(steps=4000, decay_share=0.25)
    factors = [learning_rate_factor(step, plan) for step in range(4001)]
    assert factors[0] == pytest.approx(1 / 500)
    assert set(factors[500:3000]) == {1.0}
    assert factors[3500] == pytest.approx(0.5)
    assert factors[4000] == 0


def test_decoder_training_leaves_the_latents_alone():
    torch.manual_seed(0)
    codec = build_codec(width=8)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    before = codec.encode(images).latents.detach()
    weights = [parameter.detach().clone() for parameter in codec.decoder.parameters()]
    train_codec(codec, steps=2, batch=2, decoder_only=True)
    assert torch.equal(codec.encode(images).latents, before)
    assert any(not torch.equal(a, b) for a, b in zip(weights, codec.decoder.parameters(), strict=True))


@pytest.mark.long
def test_build_writes_a_directory_that_diffusers_loads(tmp_path, monkeypatch):
    # hundreds of pictures are judged, of a model that has learnt nothing
    monkeypatch.setattr("blend.sprites.export.STEPS", 2)
    stages: list[str] = []
    build.build_base(PLAN, tmp_path / "work", tmp_path / "base", lambda stage, *_: stages.append(stage))
    assert list(dict.fromkeys(stages)) == ["codec", "scenes", "denoiser", "decoder"]
    pipeline = StableDiffusionPipeline.from_pretrained(str(tmp_path / "base"), dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline("A red colored car.", num_inference_steps=2, output_type="pt").images
    assert picture.shape == (1, 3, 64, 64)
    assert {"README.md", "loss.png", "samples.png", "figures.json"} <= {p.name for p in (tmp_path / "base").iterdir()}
    recorded = json.loads((tmp_path / "base" / "figures.json").read_text())
    assert recorded["plan"]["steps"] == 6
    assert "{" not in (tmp_path / "base" / "README.md").read_text()
    assert not list((tmp_path / "base").rglob("*.bin"))


def test_judge_is_right_on_unseen_renders():
    accuracy = measure_accuracy(load_judge(), count=300)
    assert accuracy["colours"] >= 0.98
    assert accuracy["objects"] >= 0.98


def test_sheet_keeps_every_picture():
    pictures = torch.stack([torch.full((3, 4, 4), index / 12) for index in range(12)])
    sheet = draw_sheet(pictures, columns=5, scale=2)
    assert sheet.size == (40, 24)
    assert sheet.getpixel((0, 16)) == (round(255 * 10 / 12),) * 3


@pytest.mark.slow
def test_shipped_base_follows_its_prompts():
    """Half the gate's margin on few pictures: the full figures are in tests/bench/results/main_job.json."""
    from blend.sprites import base_model_path
    from blend.sprites.captions import held_out_prompts

    prompts = held_out_prompts(32)
    verdict = load_judge().judge(sample(load_base(base_model_path()), prompts, seed=5), prompts)
    assert verdict.colours.float().mean() >= 0.8
    assert verdict.objects.float().mean() >= 0.7


def test_weights_kept_in_half_precision_read_back_as_float32(tmp_path):
    torch.manual_seed(0)
    written, read = Judge(), Judge()
    save_half(written, tmp_path / "judge.safetensors")
    load_half(read, tmp_path / "judge.safetensors")
    for one, other in zip(written.parameters(), read.parameters(), strict=True):
        assert other.dtype == torch.float32
        assert torch.equal(other, one.half().float())
