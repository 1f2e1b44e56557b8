"""What rows take of the memory: counted against what is computed by hand and what the allocator hands out."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from blend.adapters import AdapterBank
from blend.conditioning import Conditioning
from blend.footprint import _Counter, bound_bytes, count_bytes, default_memory, row_bytes
from blend.model import DiffusionModel, load_model

SHAPES = [(4, 1, 1), (4, 8, 8), (4, 20, 12), (4, 64, 64)]


@pytest.fixture(params=["tiny", "tiny_sdxl"])
def bank(request: pytest.FixtureRequest) -> AdapterBank:
    return request.getfixturevalue(f"{request.param}_bank")


@pytest.fixture
def conditioning(bank: AdapterBank, tiny_model: DiffusionModel, tiny_sdxl_model: DiffusionModel) -> Conditioning:
    model = tiny_model if bank.unet is tiny_model.unet else tiny_sdxl_model
    return model.encode_prompts([None, "a car"])


def allocated(run) -> int:
    """Return the most bytes that live at once in `run()`, as torch's CPU allocator reports them."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded, torch.inference_mode():
        run()
    changes = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def test_live_bytes_are_those_counted_by_hand():
    weight = torch.zeros(1000, 10)
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True), _Counter() as counter:
        x = torch.zeros(2, 10)  # 80 bytes
        y = torch.nn.functional.linear(x, weight)  # 8 000; the weight, seen through a view, is nobody's
        y.add_(1)
        z = y.view(10, 200).mul(2)  # 8 000
        assert counter.peak == 80 + 8_000 + 8_000
        del y, z
        torch.cat([x, x])  # 160, gone at once
        assert counter.peak == 16_080
        kept = torch.zeros(5_000, dtype=torch.float16)  # 10 000
        kept[:10].softmax(0)  # 20
    assert counter.peak == 16_080


@pytest.mark.parametrize("size", [16, 48])
def test_a_row_takes_what_the_allocator_hands_out_for_it(bank, conditioning, size):
    rows = 3
    mix = torch.ones(rows, len(bank.names))
    with torch.inference_mode():
        text = bank.encode_text(conditioning.embeds)

    def forward() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        added = {name: value[[1] * rows] for name, value in conditioning.added.items()}
        latents = torch.randn(rows, 4, size, size, generator=generator)
        embeds = conditioning.embeds[[1] * rows]
        return bank.forward(latents, torch.full((rows,), 500), embeds, mix, text, torch.ones(rows).long(), added)

    forward()
    bank._table._kept._kept.clear()
    text._kept._kept.clear()
    counted = count_bytes(bank, (4, size, size), conditioning, rows)
    assert counted == pytest.approx(allocated(forward), rel=0.05)


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_take_at_most_so_many_times_a_row_and_never_more_than_the_bound(bank, conditioning, shape):
    one = row_bytes(bank, shape, conditioning)
    assert 0.8 * 8 * one <= count_bytes(bank, shape, conditioning, 8) <= 8 * one
    assert one <= bound_bytes(bank, shape, conditioning)


def test_counting_touches_neither_the_bank_nor_its_results(tiny_sd_dir, adapter_dirs):
    model = load_model(tiny_sd_dir)
    bank = AdapterBank(model.unet)
    bank.load("a", adapter_dirs["a"])
    rows = model.encode_prompts(["a car"])
    inputs = torch.ones(1, 4, 8, 8), torch.tensor([500]), rows.embeds, torch.ones(1, 1)
    before = bank.forward(*inputs)
    with torch.inference_mode():
        alone = row_bytes(bank, (4, 8, 8), rows)
    assert torch.equal(bank.forward(*inputs), before)
    bank.add_trainable("b", rank=64)
    factors = sum(factor.numel() for factor in bank.parameters("b"))
    assert row_bytes(bank, (4, 8, 8), rows) > alone + 4 * factors


def test_by_default_rows_take_half_of_a_machines_memory():
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert default_memory(torch.device("cpu")) == total // 2
