"""Memory: samples too large for it are refused with the numbers, larger ones run in smaller tiles."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from blend.adapters import AdapterBank
from blend.engine import BlendEngine, Output, Sample, SampleError
from blend.footprint import row_bytes
from blend.model import DiffusionModel, load_model
from blend.preference import Preference
from blend.tiles import TileOptions

BLEND = Preference.parse({"a": 0.3, "b": 0.7}, 0.8, basis=("a", "b"))
LARGE = Sample("a car", BLEND, 1, num_inference_steps=2, height=128, width=96)
SMALL = replace(LARGE, seed=2, height=None, width=None, num_inference_steps=3)
COUNTED: dict[tuple[AdapterBank, tuple[int, ...]], int] = {}


def latents_of(output: Output) -> torch.Tensor:
    assert output.error is None
    assert output.latents is not None
    return output.latents


def assert_near(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * float(b.abs().max()))


def needed(model: DiffusionModel, bank: AdapterBank, sample: Sample) -> int:
    """Bytes of a row; counted once for each bank and size, as no test changes a bank."""
    shape = model.latents_shape(sample.height or model.default_height, sample.width or model.default_width)
    if (bank, shape) not in COUNTED:
        COUNTED[bank, shape] = row_bytes(bank, shape, model.encode_prompts(["a car"]))
    return COUNTED[bank, shape]


@pytest.fixture
def ran(tiny_bank, monkeypatch) -> list[int]:
    """The rows of each forward."""
    forward, counts = tiny_bank.forward, []
    monkeypatch.setattr(tiny_bank, "forward", lambda x, *args: counts.append(len(x)) or forward(x, *args))
    return counts


@pytest.mark.parametrize(("fields", "param"), [({}, "height"), ({"height": 64, "width": 160}, "width")])
def test_a_sample_of_which_no_row_fits_is_refused_with_the_numbers(tiny_model, tiny_bank, ran, fields, param):
    sample = replace(LARGE, **fields)
    bytes_there = needed(tiny_model, tiny_bank, sample) - 1
    engine = BlendEngine(tiny_model, tiny_bank, memory_bytes=bytes_there)
    with pytest.raises(SampleError) as caught:
        engine.submit(sample)
    message = str(caught.value)
    assert caught.value.param == param
    assert f"{param} is {getattr(sample, param)}" in message
    assert f"{sample.width} x {sample.height} pixels" in message
    assert f"there are {bytes_there / 1e6:.2f} MB" in message
    side = int(re.search(r"use at most about (\d+) x \1, or", message)[1])
    assert 0.6 * (sample.height * sample.width) ** 0.5 <= side
    with pytest.raises(SampleError):
        engine.run([SMALL, sample])
    assert engine.idle
    assert not ran
    engine.run([replace(sample, height=side, width=side)])
    BlendEngine(tiny_model, tiny_bank, memory_bytes=bytes_there + 1).run([sample])


def test_where_no_size_fits_the_remedy_says_so(tiny_model, tiny_bank):
    engine = BlendEngine(tiny_model, tiny_bank, memory_bytes=1000)
    with pytest.raises(SampleError, match=r"height is 32: .* 0\.00 MB .* no size fits; use an engine with more memory"):
        engine.submit(SMALL)


def test_a_refused_sample_does_not_disturb_those_in_flight(tiny_model, tiny_bank):
    expected = latents_of(BlendEngine(tiny_model, tiny_bank).run([SMALL])[0])
    engine = BlendEngine(tiny_model, tiny_bank, memory_bytes=needed(tiny_model, tiny_bank, LARGE) - 1)
    ticket, finished = engine.submit(SMALL), {}
    finished.update(engine.step())
    with pytest.raises(SampleError):
        engine.submit(LARGE)
    while not engine.idle:
        finished.update(engine.step())
    assert finished.keys() == {ticket}
    assert_near(latents_of(finished[ticket]), expected)


@pytest.mark.parametrize("deterministic", [False, True])
def test_tiles_are_cut_to_what_fits_each_size(tiny_model, tiny_bank, ran, deterministic):
    samples = [LARGE, SMALL, replace(LARGE, seed=3, num_inference_steps=3)]
    expected = [latents_of(output) for output in BlendEngine(tiny_model, tiny_bank).run(samples)]
    ran.clear()
    room = 3 * needed(tiny_model, tiny_bank, LARGE) + 1
    engine = BlendEngine(tiny_model, tiny_bank, tile_rows=6, deterministic=deterministic, memory_bytes=room)
    for output, latents in zip(engine.run(samples), expected, strict=True):
        assert_near(latents_of(output), latents)
    # six rows a sample: the two large ones in tiles of three, the small one in one tile
    assert ran == [3, 3, 3, 3, 6] * 2 + [6, 3, 3]


def test_cut_tiles_stay_deterministic(tiny_model, tiny_bank):
    room = 3 * needed(tiny_model, tiny_bank, LARGE)
    engine = BlendEngine(tiny_model, tiny_bank, tile_rows=8, deterministic=True, memory_bytes=room)
    base = replace(LARGE, seed=4, preference=Preference.base())
    samples = [LARGE, replace(LARGE, seed=3, guidance_scale=1.0), SMALL, base]
    for sample, output in zip(samples, engine.run(samples), strict=True):
        assert torch.equal(latents_of(output), latents_of(engine.run([sample])[0]))


def test_tiles_of_fixed_sizes_are_padded_no_further_than_fits(tiny_sd_dir, adapter_dirs):
    model = load_model(tiny_sd_dir)
    bank = AdapterBank(model.unet)
    for name in ("a", "b"):
        bank.load(name, adapter_dirs[name])
    options = TileOptions(compile=True, backend="eager", sizes=(4, 8))
    expected = latents_of(BlendEngine(model, bank).run([LARGE])[0])
    for fits, sizes in ((7, {4}), (3, set())):
        room = fits * needed(model, bank, LARGE)
        engine = BlendEngine(model, bank, tile_rows=6, tiles=options, memory_bytes=room)
        assert_near(latents_of(engine.run([LARGE])[0]), expected)
        assert {size for size, *_ in engine._runner._slots} == sizes


def test_memory_to_spare_is_not_counted(tiny_model, tiny_bank, monkeypatch):
    monkeypatch.setattr("blend.footprint.count_bytes", lambda *_: pytest.fail("counted"))
    latents_of(BlendEngine(tiny_model, tiny_bank).run([LARGE])[0])


@pytest.mark.parametrize("memory_bytes", [0, -1, 1.5])
def test_impossible_memory_is_refused(tiny_model, tiny_bank, memory_bytes):
    with pytest.raises(ValueError, match=r"memory_bytes is .*use an integer >= 1"):
        BlendEngine(tiny_model, tiny_bank, memory_bytes=memory_bytes)


def test_sdxl_rows_are_admitted_by_the_same_rule(tiny_sdxl_model, tiny_sdxl_bank):
    room = needed(tiny_sdxl_model, tiny_sdxl_bank, LARGE)
    expected = latents_of(BlendEngine(tiny_sdxl_model, tiny_sdxl_bank).run([LARGE])[0])
    assert_near(latents_of(BlendEngine(tiny_sdxl_model, tiny_sdxl_bank, memory_bytes=room).run([LARGE])[0]), expected)
    with pytest.raises(SampleError, match="height is 128"):
        BlendEngine(tiny_sdxl_model, tiny_sdxl_bank, memory_bytes=room - 1).submit(LARGE)


def test_running_out_of_memory_ends_the_samples_of_that_size_alone(tiny_model, tiny_bank, monkeypatch):
    engine = BlendEngine(tiny_model, tiny_bank)
    expected = latents_of(engine.run([SMALL])[0])
    forward = tiny_bank.forward

    def short_of_memory(x: torch.Tensor, *args: object) -> torch.Tensor:
        if x.shape[-1] > 8:
            raise torch.OutOfMemoryError("out of memory")
        return forward(x, *args)

    with monkeypatch.context() as patch:
        patch.setattr(tiny_bank, "forward", short_of_memory)
        small, large, other = engine.run([SMALL, LARGE, replace(LARGE, seed=3)])
    assert "out of memory" in str(large.error)
    assert "out of memory" in str(other.error)
    assert_near(latents_of(small), expected)
    latents_of(engine.run([LARGE])[0])
