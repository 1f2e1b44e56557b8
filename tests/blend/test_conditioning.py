"""What rows are conditioned on: text embeddings of one and of two encoders, pooled embeddings and sizes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from blend import conditioning
from blend.conditioning import Conditioning
from blend.model import DiffusionModel, load_model

LONG = "far too long " * 40


@pytest.fixture(scope="module")
def pipeline(tiny_sdxl_dir: Path) -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline.from_pretrained(tiny_sdxl_dir)


@pytest.mark.parametrize("prompt", ["A red colored car.", "", LONG])
@pytest.mark.parametrize("negative_prompt", [None, "", "blurry", LONG])
def test_two_encoders_give_what_diffusers_gives(tiny_sdxl_model: DiffusionModel, pipeline, prompt, negative_prompt):
    with torch.no_grad():
        text, negative, pooled, negative_pooled = pipeline.encode_prompt(prompt, negative_prompt=negative_prompt)
    rows = tiny_sdxl_model.encode_prompts([negative_prompt, prompt])
    torch.testing.assert_close(rows.embeds, torch.cat([negative, text]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rows.added["text_embeds"], torch.cat([negative_pooled, pooled]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("zeros", [True, False])
def test_without_a_negative_prompt_the_model_says_what_stands_for_it(tiny_sdxl_dir, tmp_path, zeros):
    directory = Path(shutil.copytree(tiny_sdxl_dir, tmp_path / "model"))
    index = directory / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "force_zeros_for_empty_prompt": zeros}))
    model, pipeline = load_model(directory), StableDiffusionXLPipeline.from_pretrained(directory)
    with torch.no_grad():
        _, negative, _, pooled = pipeline.encode_prompt("a cat")
    rows = model.encode_prompts([None])
    assert rows.embeds.any() == rows.added["text_embeds"].any() == (not zeros)
    torch.testing.assert_close(rows.embeds, negative, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rows.added["text_embeds"], pooled, rtol=1e-5, atol=1e-6)


def test_one_encoder_takes_the_empty_text_for_no_negative_prompt(tiny_model: DiffusionModel):
    absent, empty = (tiny_model.encode_prompts([prompt]) for prompt in (None, ""))
    assert torch.equal(absent.embeds, empty.embeds)
    assert not absent.added


@pytest.mark.parametrize("size", [(32, 32), (40, 24), (None, None)])
def test_sizes_are_those_that_diffusers_passes_on(tiny_sdxl_model: DiffusionModel, pipeline, size):
    height, width = size if size != (None, None) else (32, 32)
    expected = pipeline._get_add_time_ids((height, width), (0, 0), (height, width), torch.float32, 20)
    rows = tiny_sdxl_model.encode_prompts(["a cat", "a dog"], *size)
    assert torch.equal(rows.added["time_ids"], expected.expand(2, -1))


def test_each_prompt_is_encoded_once_and_alike_in_any_company_and_size(tiny_sdxl_dir, monkeypatch):
    model, calls = load_model(tiny_sdxl_dir), []
    for text_encoder in model.text.text_encoders:
        forward = text_encoder.forward
        monkeypatch.setattr(text_encoder, "forward", lambda *a, _f=forward, **k: calls.append(1) or _f(*a, **k))
    alone = model.encode_prompts(["a cat"])
    together = model.encode_prompts(["a dog", None, "a cat"], 40, 40)
    assert len(calls) == 2 * 3  # the third is the empty text, whose shape the zeros have
    assert torch.equal(alone.embeds[0], together.embeds[2])
    assert torch.equal(alone.added["text_embeds"][0], together.added["text_embeds"][2])


def test_only_the_prompts_seen_last_are_kept(tiny_sdxl_dir, monkeypatch):
    monkeypatch.setattr(conditioning, "_KEPT_PROMPTS", 2)
    model = load_model(tiny_sdxl_dir)
    rows = model.encode_prompts(["a cat", "a dog", "a cat", None, "a fish", "a cat"])
    assert list(model.text._kept) == ["a fish", "a cat"]
    assert torch.equal(rows.embeds[0], rows.embeds[5])
    torch.testing.assert_close(model.encode_prompts(["a dog"]).embeds[0], rows.embeds[1], rtol=0, atol=0)


def test_embeddings_made_in_inference_mode_serve_a_backward_pass(tiny_sdxl_dir):
    model = load_model(tiny_sdxl_dir)
    with torch.inference_mode():
        model.encode_prompts([None, "a cat"])
    rows = model.encode_prompts([None, "a cat"])
    weight = torch.ones(1, requires_grad=True)
    (rows.embeds.sum() * weight + (rows.added["text_embeds"] * weight).sum()).backward()
    assert weight.grad is not None


def test_rows_are_chosen_and_joined_with_all_that_belongs_to_them():
    first = Conditioning(torch.arange(6.0).view(3, 1, 2), {"time_ids": torch.arange(3.0)[:, None]})
    second = Conditioning(torch.ones(1, 1, 2), {"time_ids": torch.tensor([[7.0]])})
    both = Conditioning.cat([first.rows(torch.tensor([2, 0])), second])
    assert len(both) == 3
    assert torch.equal(both.embeds, torch.tensor([[[4.0, 5.0]], [[0.0, 1.0]], [[1.0, 1.0]]]))
    assert torch.equal(both.added["time_ids"], torch.tensor([[2.0], [0.0], [7.0]]))
