"""Previews: what they show, what they cost the samples (nothing), and when there is none."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderTiny

from blend.adapters import AdapterBank
from blend.engine import BlendEngine, Sample
from blend.model import load_model
from blend.preference import Preference
from blend.previews import MOST_IMAGES, LinearDecoder, Previewer
from blend.sprites import base_model_path
from blend.sprites.captions import held_out_prompts


def sample_of(**fields) -> Sample:
    return Sample(**{"prompt": "a cat", "preference": Preference.base(), "seed": 3, "num_inference_steps": 4, **fields})


def run_to_the_last_step(engine: BlendEngine, sample: Sample) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the preview before the last step, and the latents after it."""
    ticket = engine.submit(sample)
    for _ in range(sample.num_inference_steps - 1):
        engine.step()
    shown = engine.preview(ticket)
    latents = engine.step()[ticket].latents
    assert shown is not None
    assert latents is not None
    return shown, latents


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


def cells(image: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.adaptive_avg_pool2d(image, like.shape[-2:])


@pytest.fixture(scope="module")
def sprites() -> BlendEngine:
    model = load_model(base_model_path())
    return BlendEngine(model, AdapterBank(model.unet))


@pytest.fixture
def engine(tiny_model, tiny_bank) -> BlendEngine:
    return BlendEngine(tiny_model, tiny_bank)


@pytest.mark.parametrize("solver", ["ddim", "dpmpp"])
def test_with_a_tiny_decoder_the_last_preview_is_nearly_the_image(sprites, solver):
    assert isinstance(sprites.model.vae, AutoencoderTiny)
    sample = sample_of(prompt="A red colored car.", num_inference_steps=20, solver=solver)
    shown, latents = run_to_the_last_step(sprites, sample)
    image = sprites.decode([latents])[0]
    assert shown.shape == image.shape
    assert (shown - image).square().mean().sqrt() < 0.05


def test_a_preview_is_the_decoded_prediction_of_the_latest_step(sprites):
    recorded = sprites.run([sample_of(num_inference_steps=4, record=True)])[0].trajectory
    ticket = sprites.submit(sample_of(num_inference_steps=4))
    alphas = sprites.model.scheduler.alphas_cumprod
    text = sprites.model.encode_prompts([None, "a cat"], 64, 64).embeds
    for step in range(3):
        sprites.step()
        x, t = recorded.latents[step][None], recorded.timesteps[step]
        with torch.no_grad():
            uncond, cond = sprites.model.unet(x.expand(2, -1, -1, -1), t, encoder_hidden_states=text).sample
        eps = uncond + 3.0 * (cond - uncond)
        origin = (x[0] - (1 - alphas[t]).sqrt() * eps) / alphas[t].sqrt()
        torch.testing.assert_close(sprites.preview(ticket), sprites.model.decode(origin[None])[0], rtol=1e-3, atol=1e-3)
    sprites.abort(ticket)


def test_the_linear_map_shows_what_a_trained_decoder_would(sprites):
    """The sprites' decoder can be run as well, so that the map is judged against the truth, on unseen images."""
    outputs = sprites.run(
        [sample_of(prompt=prompt, seed=i, num_inference_steps=8) for i, prompt in enumerate(held_out_prompts(8))]
    )
    latents = torch.stack([output.latents for output in outputs])
    images = sprites.model.decode(latents)
    linear = LinearDecoder(sprites.model.latent_channels)
    linear.observe(latents[:5], images[:5])
    shown = linear.decode(latents[5:])
    assert correlation(shown, cells(images[5:], latents)) > 0.85


def test_the_linear_map_follows_a_large_decoder(engine):
    assert not isinstance(engine.model.vae, AutoencoderTiny)
    outputs = engine.run([sample_of(seed=seed) for seed in range(6)])
    images = engine.decode([output.latents for output in outputs])
    shown, latents = run_to_the_last_step(engine, sample_of(seed=9))
    assert shown.shape == (3, *latents.shape[1:])
    assert 0 <= shown.min() <= shown.max() <= 1
    unseen = engine.model.decode(latents[None])[0]
    mean = images.mean((0, 2, 3)).view(3, 1, 1)
    decoded = engine._previewer._linear.decode(latents[None])[0]
    # no worse than the mean colour, and in step with the decoder; its weights are random, nothing more can be asked
    assert (decoded - cells(unseen, latents)).square().mean() < (mean - cells(unseen, latents)).square().mean()
    assert correlation(decoded, cells(unseen, latents)) > 0.5


def test_the_first_preview_decodes_once_and_later_ones_never(engine, monkeypatch):
    calls = []
    decode = engine.model.decode
    monkeypatch.setattr(engine.model, "decode", lambda latents: calls.append(1) or decode(latents))
    ticket = engine.submit(sample_of())
    engine.step()
    first = engine.preview(ticket)
    engine.step()
    later = engine.preview(ticket)
    assert len(calls) == 1
    assert not torch.equal(first, later)


def test_there_is_no_preview_before_the_first_step_nor_of_strangers(engine):
    ticket = engine.submit(sample_of(num_inference_steps=2))
    assert engine.preview(ticket) is None
    engine.step()
    assert engine.preview(ticket) is not None
    engine.step()
    for stranger in (ticket, 999):
        with pytest.raises(KeyError, match="waiting or in flight"):
            engine.preview(stranger)
    aborted = engine.submit(sample_of())
    engine.step()
    engine.abort(aborted)
    with pytest.raises(KeyError):
        engine.preview(aborted)


def test_previews_change_no_bit_of_any_result(tiny_model, tiny_bank):
    samples = [sample_of(seed=1), sample_of(seed=2, solver="dpmpp", eta=0.3), sample_of(seed=3, height=48, record=True)]

    def finish(previews: bool) -> list[torch.Tensor]:
        engine = BlendEngine(tiny_model, tiny_bank)
        tickets, outputs = [engine.submit(sample) for sample in samples], {}
        while not engine.idle:
            outputs.update(engine.step())
            for ticket in tickets if previews else []:
                if ticket not in outputs:
                    engine.preview(ticket)
        return [outputs[ticket].latents for ticket in tickets]

    for plain, watched in zip(finish(False), finish(True), strict=True):
        assert torch.equal(plain, watched)


def test_the_fit_finds_a_linear_decoder_and_keeps_only_sums():
    generator = torch.Generator().manual_seed(0)
    truth, offset = 0.05 * torch.randn(3, 4, generator=generator), torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)

    def colours(latents: torch.Tensor) -> torch.Tensor:
        return torch.einsum("rc,bchw->brhw", truth, latents) + offset

    linear = LinearDecoder(4)
    with pytest.raises(RuntimeError, match="seen no image"):
        linear.decode(torch.zeros(1, 4, 2, 2))
    for seed in range(MOST_IMAGES + 5):
        latents = torch.randn(1, 4, 6, 5, generator=torch.Generator().manual_seed(seed))
        pixels = colours(latents).repeat_interleave(8, 2).repeat_interleave(8, 3)
        if seed == 2:
            pixels[0, 0, 0, 0] = torch.nan
        linear.observe(latents, pixels)
    assert linear.images == MOST_IMAGES
    assert linear._moments.shape == (5, 8)
    latents = torch.randn(2, 4, 3, 3, generator=generator)
    torch.testing.assert_close(linear.decode(latents), colours(latents), rtol=1e-3, atol=1e-3)


def test_one_flat_image_still_gives_a_finite_map(tiny_model):
    linear = LinearDecoder(4)
    linear.observe(torch.zeros(1, 4, 3, 3), torch.full((1, 3, 24, 24), 0.25))
    shown = linear.decode(torch.zeros(1, 4, 3, 3))
    torch.testing.assert_close(shown, torch.full((1, 3, 3, 3), 0.25), rtol=1e-3, atol=1e-3)
    assert Previewer(tiny_model).show(torch.zeros(4, 8, 8)).isfinite().all()
