"""Tiles: padded, compiled and eager ones predict what the bank does; no graph breaks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from blend.adapters import AdapterBank
from blend.model import load_model
from blend.tiles import TileOptions, Tiles

COMPILED = TileOptions(compile=True, channels_last=True, backend="eager", sizes=(2, 4))


@pytest.fixture
def bank(tiny_sd_dir: Path, adapter_dirs: dict[str, Path]) -> AdapterBank:
    bank = AdapterBank(load_model(tiny_sd_dir).unet)
    for name, path in adapter_dirs.items():
        bank.load(name, path)
    return bank


def rows_of(count: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(4)[torch.arange(count) % 4][:, :3].roll(seed, 0)
    return (
        torch.randn(count, 4, 8, 8, generator=generator),
        torch.randint(0, 1000, (count,), generator=generator),
        torch.randn(count, 77, 32, generator=generator),
        mix,
    )


@pytest.mark.parametrize("channels_last", [False, True])
def test_an_eager_tile_is_the_banks_forward(bank, channels_last):
    with torch.inference_mode():
        expected = bank.forward(*rows_of(3))
        got = Tiles(bank, TileOptions(channels_last=channels_last)).run(*rows_of(3))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.long
def test_compiled_tiles_equal_eager_ones_at_every_count_without_graph_breaks(bank):
    # fullgraph=True: a graph break raises
    tiles = Tiles(bank, replace(COMPILED, backend="aot_eager"))
    with torch.inference_mode():
        for count, seed in ((1, 0), (3, 1), (2, 2), (4, 3), (3, 4)):
            rows = rows_of(count, seed)
            torch.testing.assert_close(tiles.run(*rows), bank.forward(*rows), rtol=1e-5, atol=1e-5)
    assert len(tiles._slots) == 2


def test_tiles_are_cut_to_what_fits_with_their_padding(bank):
    eager, fixed = Tiles(bank), Tiles(bank, COMPILED)
    assert [eager.fitting(3, limit) for limit in (0, 1, 2, 9)] == [1, 1, 2, 3]
    # of 2 and 4 rows, or eager ones of any number
    assert [fixed.fitting(3, limit) for limit in (0, 1, 2, 3, 4)] == [1, 1, 2, 2, 3]
    assert [fixed.fitting(6, limit) for limit in (3, 5, 6)] == [2, 4, 6]
    with torch.inference_mode():
        fixed.run(*rows_of(3), limit=3)
        assert not fixed._slots
        fixed.run(*rows_of(3), limit=4)
    assert len(fixed._slots) == 1


def test_compiled_tiles_take_text_and_base_rows(bank):
    tiles = Tiles(bank, COMPILED)
    sample, timesteps, embeds, mix = rows_of(4)
    index = torch.tensor([1, 0, 1, 1])
    with torch.inference_mode():
        for text_embeds in (embeds[:2], embeds[2:]):
            text = bank.encode_text(text_embeds)
            for weights in (mix, torch.zeros_like(mix)):
                expected = bank.forward(sample, timesteps, text_embeds[index], weights)
                got = tiles.run(sample, timesteps, text_embeds[index], weights, text, index)
                torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert len(tiles._slots) == 1


def test_predictions_of_earlier_tiles_stay_as_they_were(bank):
    tiles = Tiles(bank, COMPILED)
    with torch.inference_mode():
        first = tiles.run(*rows_of(2))
        kept = first.clone()
        tiles.run(*rows_of(2, seed=5))
    assert torch.equal(first, kept)


def test_a_compiled_tile_follows_the_bank(bank, adapter_dirs):
    tiles = Tiles(bank, COMPILED)
    sample, timesteps, embeds, mix = rows_of(2)
    with torch.inference_mode():
        tiles.run(sample, timesteps, embeds, mix)
        bank.remove("a")
        got = tiles.run(sample, timesteps, embeds, mix[:, 1:])
        torch.testing.assert_close(got, bank.forward(sample, timesteps, embeds, mix[:, 1:]), rtol=1e-5, atol=1e-5)


def test_tiles_beyond_the_sizes_and_banks_in_training_run_eagerly(bank):
    tiles = Tiles(bank, COMPILED)
    with torch.inference_mode():
        assert torch.equal(tiles.run(*rows_of(5)), bank.forward(*rows_of(5)))
    bank.add_trainable("x", rank=2)
    sample, timesteps, embeds, _ = rows_of(2)
    tiles.run(sample, timesteps, embeds, torch.eye(4)[[3, 3]]).sum().backward()
    assert any(factor.grad.any() for factor in bank.parameters("x"))
    assert not tiles._slots


def test_options_that_do_not_fit_are_refused(bank):
    with pytest.raises(ValueError, match="on cpu: use graphs=False"):
        Tiles(bank, TileOptions(graphs=True))
    with pytest.raises(ValueError, match="sizes is"):
        Tiles(bank, TileOptions(compile=True, sizes=()))
