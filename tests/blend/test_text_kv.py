"""Keys and values of the text, looked up: equal to computing them, whatever the neighbours, within bounded memory."""

from __future__ import annotations

import pytest
import torch

from blend.adapters import AdapterBank, AdapterError
from blend.engine import BlendEngine, Sample
from blend.model import load_model
from blend.preference import Preference
from blend.text_kv import TextCache, TextKV, text_layers

MIXES = {
    "one-hot": [[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0]],
    "soup": [[0.5, 0.3, 0.2], [0.75, 0.75, 0.0], [0.0, 0.0, -0.4], [1.5, 0.0, 0.0]],
    "base": [[0.0, 0, 0]] * 4,
}
TEXT_ROWS = torch.tensor([0, 1, 1, 0])


@pytest.fixture(scope="module")
def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 250, 600, 981])


@pytest.fixture(scope="module")
def embeds() -> torch.Tensor:
    return torch.randn(2, 77, 32, generator=torch.Generator().manual_seed(1))


def looked_up(bank: AdapterBank, inputs, embeds, mix, text: TextKV, rows=TEXT_ROWS) -> torch.Tensor:
    with torch.inference_mode():
        return bank.forward(*inputs, embeds[rows], mix, text, rows)


@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
def test_looked_up_equals_computed(tiny_bank, inputs, embeds, mix):
    mix = torch.tensor(mix)
    text = tiny_bank.encode_text(embeds)
    with torch.inference_mode():
        expected = tiny_bank.forward(*inputs, embeds[TEXT_ROWS], mix)
    torch.testing.assert_close(looked_up(tiny_bank, inputs, embeds, mix, text), expected, rtol=1e-5, atol=1e-5)


def test_the_text_layers_do_not_run(tiny_bank, inputs, embeds):
    text = tiny_bank.encode_text(embeds)
    layers = text_layers(tiny_bank.unet)
    assert tuple(text.lines.shapes) == layers
    assert all(".attn2.to_" in layer for layer in layers)
    mix = torch.tensor(MIXES["soup"])
    expected = looked_up(tiny_bank, inputs, embeds, mix, text)
    # the embeddings themselves are no longer read
    assert torch.equal(looked_up(tiny_bank, inputs, torch.full_like(embeds, torch.nan), mix, text), expected)


def test_bits_of_a_row_do_not_depend_on_its_neighbours(tiny_bank, inputs, embeds):
    mix = torch.tensor([[1.0, 0, 0], [0.2, 0.3, 0.5], [0, 0, 1], [0, 0, 0]])
    together = looked_up(tiny_bank, inputs, embeds, mix, tiny_bank.encode_text(embeds))
    for row in range(4):
        padded = torch.full((4,), row)
        one = TextKV.cat([tiny_bank.encode_text(embeds[TEXT_ROWS[row]][None])])
        alone = looked_up(
            tiny_bank, [x[padded] for x in inputs], embeds[TEXT_ROWS[padded]], mix[padded], one, torch.zeros(4).long()
        )
        assert torch.equal(alone, together[padded])


def test_an_overflowing_adapter_stays_out_of_the_rows_that_do_not_use_it(tiny_bank, inputs, embeds):
    text = tiny_bank.encode_text(embeds)
    mix = torch.tensor(MIXES["one-hot"])
    expected = looked_up(tiny_bank, inputs, embeds, mix, text)
    broken = TextKV(tuple(table.clone() for table in text.tables), text.lines)
    for table in broken.tables:
        table[2] = torch.inf
    rows = looked_up(tiny_bank, inputs, embeds, mix, broken)
    assert not rows[1].isfinite().all()
    assert torch.equal(rows[[0, 2, 3]], expected[[0, 2, 3]])


def test_adapters_of_different_layers_and_ranks(tiny_sd_dir, adapter_dirs, inputs, embeds):
    bank = AdapterBank(load_model(tiny_sd_dir).unet)
    bank.load("a", adapter_dirs["a"])
    for factor in bank.add_trainable("few", rank=5, target_modules=["attn2.to_v", "to_q"]):
        factor.requires_grad_(False).add_(0.1)
    mix = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.5, 0.5], [0.0, 0.0]])
    with torch.inference_mode():
        expected = bank.forward(*inputs, embeds[TEXT_ROWS], mix)
    got = looked_up(bank, inputs, embeds, mix, bank.encode_text(embeds))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_mixed_rows_are_kept_between_steps_and_never_mistaken(tiny_bank, embeds):
    text = tiny_bank.encode_text(embeds)
    mix = torch.tensor(MIXES["one-hot"])
    first = text.mixed(TEXT_ROWS, mix)
    assert text.mixed(TEXT_ROWS.clone(), mix.clone()) is first
    assert not torch.equal(text.mixed(1 - TEXT_ROWS, mix), first)
    assert not torch.equal(text.mixed(TEXT_ROWS, mix.flip(0)), first)


def test_the_cache_keeps_the_last_prompts_within_its_bytes(tiny_bank, embeds, monkeypatch):
    encode, encoded = tiny_bank.encode_text, []
    monkeypatch.setattr(tiny_bank, "encode_text", lambda rows: encoded.append(len(rows)) or encode(rows))
    cache = TextCache(tiny_bank, limit=2 * encode(embeds[:1]).nbytes)
    first = cache.rows(["x", "y", "x"], embeds[[0, 1, 0]])
    assert encoded == [1, 1]
    assert first.tables[0] is first.tables[2]
    cache.rows(["z"], embeds[:1])  # pushes out y
    assert cache.rows(["x"], embeds[:1]).tables[0] is first.tables[0]
    assert len(encoded) == 3
    cache.rows(["y"], embeds[1:])
    assert len(encoded) == 4


def test_the_cache_follows_the_bank(tiny_sd_dir, adapter_dirs, embeds):
    bank = AdapterBank(load_model(tiny_sd_dir).unet)
    cache = TextCache(bank)
    for k, name in enumerate(adapter_dirs):
        bank.load(name, adapter_dirs[name])
        assert len(cache.rows(["x"], embeds[:1]).tables[0]) == k + 2
    bank.add_trainable("new", rank=2)
    assert cache.rows(["x"], embeds[:1]) is None


def test_an_adapter_in_training_never_meets_kept_values(tiny_sd_dir, inputs, embeds):
    bank = AdapterBank(load_model(tiny_sd_dir).unet)
    bank.add_trainable("x", rank=2)
    assert bank.trainable
    text, mix = bank.encode_text(embeds), torch.ones(4, 1)
    with pytest.raises(AdapterError, match="training"):
        bank.forward(*inputs, embeds[TEXT_ROWS], mix, text, TEXT_ROWS)


def test_a_batch_beyond_the_limit_gets_no_tables(tiny_bank, embeds):
    one = tiny_bank.encode_text(embeds[:1]).nbytes
    assert TextCache(tiny_bank, limit=2 * one).rows(["x", "y", "x"], embeds[[0, 1, 0]]) is not None
    assert TextCache(tiny_bank, limit=2 * one - 1).rows(["x", "y"], embeds) is None


def test_company_does_not_decide_whether_a_steady_cache_gives_tables(tiny_bank, embeds):
    one = tiny_bank.encode_text(embeds[:1]).nbytes
    enough, little = (TextCache(tiny_bank, limit=limit, steady=True) for limit in (2 * one, 2 * one - 1))
    for prompts in (["x"], ["x", "y"], ["x", "y", "z"]):
        rows = embeds[:1].expand(len(prompts), -1, -1)
        assert enough.rows(prompts, rows) is not None
        assert little.rows(prompts, rows) is None


def test_a_batch_does_not_push_out_what_it_needs(tiny_bank, embeds, monkeypatch):
    encode, encoded = tiny_bank.encode_text, []
    monkeypatch.setattr(tiny_bank, "encode_text", lambda rows: encoded.append(len(rows)) or encode(rows))
    cache = TextCache(tiny_bank, limit=2 * encode(embeds[:1]).nbytes)
    cache.rows(["x", "y"], embeds)
    cache.rows(["z", "x"], embeds)
    assert len(encoded) == 3


@pytest.mark.parametrize("deterministic", [False, True])
def test_an_engine_beyond_the_limit_gives_the_same_latents(tiny_model, tiny_bank, deterministic):
    blend = Preference(weights=dict.fromkeys(tiny_bank.names, 1 / len(tiny_bank.names)))
    samples = [Sample(prompt, blend, seed, num_inference_steps=3) for seed, prompt in enumerate(("a car", "a cat"))]
    found = []
    for limit in (2**30, 1):
        engine = BlendEngine(tiny_model, tiny_bank, tile_rows=4, deterministic=deterministic)
        engine._text = TextCache(tiny_bank, limit, steady=deterministic)
        found.append(torch.stack([output.latents for output in engine.run(samples)]))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-5 * float(found[0].abs().max()))
