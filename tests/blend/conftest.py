"""A loaded tiny model and a bank of three adapters of different ranks, shared and never changed by a test."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from blend.adapters import AdapterBank
from blend.model import DiffusionModel, load_model


@pytest.fixture(scope="session")
def adapter_dirs(tiny_lora: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {name: tiny_lora(root / name, seed, rank) for name, seed, rank in (("a", 1, 4), ("b", 2, 2), ("c", 3, 3))}


@pytest.fixture(scope="session")
def tiny_model(tiny_sd_dir: Path) -> DiffusionModel:
    return load_model(tiny_sd_dir)


@pytest.fixture(scope="session")
def tiny_bank(tiny_model: DiffusionModel, adapter_dirs: dict[str, Path]) -> AdapterBank:
    bank = AdapterBank(tiny_model.unet)
    for name, path in adapter_dirs.items():
        bank.load(name, path)
    return bank
