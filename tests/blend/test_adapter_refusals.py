"""Adapters and files that cannot be used are refused by name, and leave nothing behind."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from blend.adapters import AdapterBank, AdapterError
from blend.lora_file import WEIGHT_NAME
from blend.model import load_model

LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "holds no LoRA factors"),
        ({f"unet.{LAYER}.lora_A.weight": (2, 16)}, "has a down factor alone"),
        ({f"unet.{LAYER}.lora_A.weight": (2, 16), f"unet.{LAYER}.lora_B.weight": (16, 3)}, "rank 2 and 3"),
        ({f"unet.{LAYER}.lora_A.weight": (2, 320), f"unet.{LAYER}.lora_B.weight": (320, 2)}, "another base model"),
        ({"unet.mid.to_q.lora_A.weight": (2, 16), "unet.mid.to_q.lora_B.weight": (16, 2)}, r"no layer mid\.to_q"),
        (
            {"unet.conv_in.lora_A.weight": (2, 4, 3, 3), "unet.conv_in.lora_B.weight": (16, 2, 1, 1)},
            "layer conv_in is a Conv2d: only nn.Linear",
        ),
        ({f"unet.{LAYER}.lora_magnitude_vector": (16,)}, "DoRA"),
        ({f"unet.{LAYER}.lokr_w1": (2, 2)}, "LoKr"),
        ({"text_encoder.layers.0.q_proj.lora_A.weight": (2, 32)}, "UNet alone"),
        ({"something.else": (2, 2)}, "something.else is no LoRA factor"),
    ],
)
def test_adapters_that_do_not_fit_are_refused_by_name_and_leave_nothing(fresh_bank, tmp_path, tensors, message):
    save_file({key: torch.ones(shape) for key, shape in tensors.items()}, tmp_path / WEIGHT_NAME)
    with pytest.raises(AdapterError, match=message):
        fresh_bank.load("x", tmp_path)
    assert fresh_bank.names == ()


def test_values_that_are_not_finite_are_refused(fresh_bank, adapter_dirs, tmp_path):
    tensors = load_file(adapter_dirs["a"] / WEIGHT_NAME)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, tmp_path / WEIGHT_NAME)
    with pytest.raises(AdapterError, match="not finite"):
        fresh_bank.load("x", tmp_path)


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-7], lambda data: b"\x00" * 40, lambda data: b"", lambda data: b"PK"]
)
def test_damaged_files_are_refused(fresh_bank, adapter_dirs, tmp_path, damage):
    (tmp_path / WEIGHT_NAME).write_bytes(damage((adapter_dirs["a"] / WEIGHT_NAME).read_bytes()))
    with pytest.raises(AdapterError, match="not a readable safetensors file"):
        fresh_bank.load("x", tmp_path)


def test_a_damaged_header_and_dora_are_refused(fresh_bank, adapter_dirs, tmp_path):
    tensors = load_file(adapter_dirs["a"] / WEIGHT_NAME)
    for text, message in (("{", "no JSON object"), (json.dumps({"unet.use_dora": True}), "DoRA")):
        save_file(tensors, tmp_path / WEIGHT_NAME, metadata={"lora_adapter_metadata": text})
        with pytest.raises(AdapterError, match=message):
            fresh_bank.load("x", tmp_path)


def test_names_are_unique_and_known(fresh_bank, adapter_dirs, tmp_path):
    fresh_bank.load("a", adapter_dirs["a"])
    with pytest.raises(AdapterError, match="'a' is already there"):
        fresh_bank.load("a", adapter_dirs["b"])
    with pytest.raises(AdapterError, match="no adapter 'b': use one of a"):
        fresh_bank.remove("b")
    with pytest.raises(AdapterError, match="no adapter at"):
        fresh_bank.load("b", tmp_path)


def test_impossible_trainable_adapters_are_refused(fresh_bank):
    with pytest.raises(AdapterError, match="rank is 0"):
        fresh_bank.add_trainable("x", rank=0)
    with pytest.raises(AdapterError, match="'to_z'"):
        fresh_bank.add_trainable("x", rank=2, target_modules=["to_z"])
    with pytest.raises(AdapterError, match="Conv2d"):
        fresh_bank.add_trainable("x", rank=2, target_modules=["conv_in"])
    assert fresh_bank.names == ()


def test_an_adapter_of_another_base_is_refused(tiny_sd_dir, tmp_path):
    banks = [AdapterBank(load_model(tiny_sd_dir).unet, base_hash=one) for one in ("1" * 64, "2" * 64)]
    banks[0].add_trainable("x", rank=2)
    banks[0].save("x", tmp_path)
    banks[0].load("same", tmp_path)
    with pytest.raises(AdapterError, match="base 111111111111, not from 222222222222"):
        banks[1].load("x", tmp_path)
