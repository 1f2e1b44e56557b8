"""Adapters per row: against diffusers' own LoRA loading, against merged weights, and through files."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_kohya
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from blend.adapters import AdapterBank, AdapterError
from blend.lora_file import WEIGHT_NAME, read_lora
from blend.model import load_model

ROWS = 4


@pytest.fixture(scope="module")
def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(ROWS, 4, 8, 8, generator=generator)
    embeds = torch.randn(ROWS, 77, 32, generator=generator)
    return sample, torch.tensor([1, 250, 600, 981]), embeds


def with_diffusers(tiny_sd_dir: Path, path: Path, inputs) -> torch.Tensor:
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd_dir, safety_checker=None)
    pipeline.load_lora_weights(path, weight_name=WEIGHT_NAME)
    sample, timesteps, embeds = inputs
    return pipeline.unet(sample, timesteps, encoder_hidden_states=embeds).sample.detach()


def blended(bank: AdapterBank, mix: torch.Tensor, inputs) -> torch.Tensor:
    with torch.no_grad():
        return bank.forward(*inputs, mix)


def save_peft(tiny_sd_dir: Path, directory: Path, config: LoraConfig, *, metadata: bool = True) -> Path:
    """An adapter with random factors, written by diffusers itself."""
    unet = load_model(tiny_sd_dir).unet
    unet.add_adapter(config)
    generator = torch.Generator().manual_seed(7)
    for name, parameter in unet.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    StableDiffusionPipeline.save_lora_weights(
        directory,
        unet_lora_layers=get_peft_model_state_dict(unet),
        unet_lora_adapter_metadata=unet.peft_config["default"].to_dict() if metadata else None,
    )
    return directory


def test_a_one_hot_row_is_that_adapter_in_diffusers_and_a_row_of_zeros_the_base(
    tiny_bank, tiny_model, tiny_sd_dir, adapter_dirs, inputs
):
    mix = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0]])
    mixed = blended(tiny_bank, mix, inputs)
    base = tiny_model.unet(inputs[0], inputs[1], encoder_hidden_states=inputs[2]).sample.detach()
    for row, path in enumerate(adapter_dirs.values()):
        expected = with_diffusers(tiny_sd_dir, path, inputs)[row]
        torch.testing.assert_close(mixed[row], expected, rtol=1e-5, atol=1e-5)
        assert (expected - base[row]).abs().max() > 0.01
    torch.testing.assert_close(mixed[3], base[3], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("weights", [[0.5, 0.3, 0.2], [0.75, 0.75, 0.0], [0.0, 0.0, -0.4]])
def test_a_row_of_weights_is_the_unet_with_merged_products(tiny_bank, tiny_model, adapter_dirs, inputs, weights):
    merged = copy.deepcopy(tiny_model.unet)
    for weight, path in zip(weights, adapter_dirs.values(), strict=True):
        for name, layer in read_lora(path).layers.items():
            target = merged.get_submodule(name)
            target.weight.data += weight * layer.scale * layer.up @ layer.down
    expected = merged(inputs[0], inputs[1], encoder_hidden_states=inputs[2]).sample.detach()
    mixed = blended(tiny_bank, torch.tensor([weights] * ROWS), inputs)
    torch.testing.assert_close(mixed, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=3, lora_alpha=6, target_modules=["to_q", "to_k", "to_v", "to_out.0"]),
        LoraConfig(r=4, lora_alpha=8, use_rslora=True, target_modules=["to_q", "to_v"]),
        LoraConfig(
            r=2, lora_alpha=4, rank_pattern={"attn2.to_k": 5}, alpha_pattern={"attn2.to_k": 1}, target_modules=["to_k"]
        ),
        LoraConfig(r=2, lora_alpha=2, target_modules=["ff.net.2", "time_emb_proj", "linear_1"]),
    ],
    ids=["alpha", "rslora", "patterns", "other-linear-layers"],
)
def test_what_diffusers_writes_is_read_as_diffusers_reads_it(fresh_bank, tiny_sd_dir, tmp_path, inputs, config):
    path = save_peft(tiny_sd_dir, tmp_path, config)
    fresh_bank.load("x", path)
    expected = with_diffusers(tiny_sd_dir, path, inputs)
    torch.testing.assert_close(blended(fresh_bank, torch.ones(ROWS, 1), inputs), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_a_mixed_batch_is_pefts_own_mixed_batch(tiny_bank, tiny_sd_dir, adapter_dirs, inputs):
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd_dir, safety_checker=None)
    for name, path in adapter_dirs.items():
        pipeline.load_lora_weights(path, weight_name=WEIGHT_NAME, adapter_name=name)
    hooks = [
        module.register_forward_pre_hook(partial(name_adapters, ["b", "__base__", "c", "a"]), with_kwargs=True)
        for module in pipeline.unet.modules()
        if isinstance(module, BaseTunerLayer)
    ]
    with torch.no_grad():
        expected = pipeline.unet(inputs[0], inputs[1], encoder_hidden_states=inputs[2]).sample
    assert hooks
    mix = torch.tensor([[0.0, 1, 0], [0, 0, 0], [0, 0, 1], [1, 0, 0]])
    torch.testing.assert_close(blended(tiny_bank, mix, inputs), expected, rtol=1e-5, atol=1e-5)


def name_adapters(names: list[str], module, args, kwargs):
    return args, {**kwargs, "adapter_names": names}


def test_without_metadata_alpha_is_the_rank(fresh_bank, tiny_sd_dir, tmp_path, inputs):
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["to_q"])
    path = save_peft(tiny_sd_dir, tmp_path, config, metadata=False)
    assert {layer.scale for layer in read_lora(path).layers.values()} == {1.0}
    fresh_bank.load("x", path / WEIGHT_NAME)
    expected = with_diffusers(tiny_sd_dir, path, inputs)
    torch.testing.assert_close(blended(fresh_bank, torch.ones(ROWS, 1), inputs), expected, rtol=1e-5, atol=1e-5)


def test_a_kohya_file_with_alphas_is_read_as_diffusers_reads_it(
    fresh_bank, tiny_sd_dir, adapter_dirs, tmp_path, inputs
):
    tensors = convert_state_dict_to_kohya(load_file(adapter_dirs["a"] / WEIGHT_NAME))
    kohya = {key: torch.tensor(2.0) if key.endswith(".alpha") else value for key, value in tensors.items()}
    assert len(kohya) == 3 * len(read_lora(adapter_dirs["a"]).layers)
    save_file({key: value.contiguous() for key, value in kohya.items()}, tmp_path / WEIGHT_NAME)
    fresh_bank.load("x", tmp_path)
    assert {layer.scale for layer in read_lora(tmp_path).layers.values()} == {0.5}
    expected = with_diffusers(tiny_sd_dir, tmp_path, inputs)
    torch.testing.assert_close(blended(fresh_bank, torch.ones(ROWS, 1), inputs), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("alpha", [None, 8.0])
def test_a_trained_adapter_saved_loads_in_diffusers_with_equal_output(fresh_bank, tiny_sd_dir, tmp_path, inputs, alpha):
    parameters = fresh_bank.add_trainable("x", rank=4, alpha=alpha, seed=5)
    base = blended(fresh_bank, torch.zeros(ROWS, 1), inputs)
    assert torch.equal(blended(fresh_bank, torch.ones(ROWS, 1), inputs), base)
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    for _ in range(2):
        optimizer.zero_grad()
        fresh_bank.forward(*inputs, torch.ones(ROWS, 1)).square().mean().backward()
        optimizer.step()
    tuned = blended(fresh_bank, torch.ones(ROWS, 1), inputs)
    assert (tuned - base).abs().max() > 1e-3
    path = fresh_bank.save("x", tmp_path, {"reward": "colour"})
    assert read_lora(path).header["reward"] == "colour"
    torch.testing.assert_close(with_diffusers(tiny_sd_dir, tmp_path, inputs), tuned, rtol=1e-5, atol=1e-5)
    fresh_bank.load("again", tmp_path)
    again = blended(fresh_bank, torch.tensor([[0.0, 1.0]] * ROWS), inputs)
    torch.testing.assert_close(again, tuned, rtol=1e-5, atol=1e-5)


def test_every_trainable_factor_gets_its_gradient_and_only_from_its_rows(fresh_bank, tiny_lora, tmp_path, inputs):
    fresh_bank.load("frozen", tiny_lora(tmp_path, seed=4))
    parameters = fresh_bank.add_trainable("x", rank=2)
    for factor in parameters:
        with torch.no_grad():
            factor.add_(0.1)
    fresh_bank.forward(*inputs, torch.tensor([[1.0, 0.0]] * ROWS)).sum().backward()
    assert all(factor.grad is None or not factor.grad.any() for factor in parameters)
    fresh_bank.forward(*inputs, torch.tensor([[0.5, 0.5]] * ROWS)).sum().backward()
    assert all(factor.grad.any() for factor in parameters)
    assert not any(parameter.requires_grad for parameter in fresh_bank.unet.parameters())


def test_stacks_kept_for_inference_follow_the_optimizer_and_serve_training_after(fresh_bank, inputs):
    parameters = fresh_bank.add_trainable("x", rank=2)
    ones = torch.ones(ROWS, 1)
    with torch.inference_mode():
        before = fresh_bank.forward(*inputs, ones).clone()
    with torch.no_grad():
        parameters[1].add_(1.0)
    with torch.inference_mode():
        after = fresh_bank.forward(*inputs, ones).clone()
    assert (after - before).abs().max() > 1e-4
    trained = fresh_bank.forward(*inputs, ones)
    torch.testing.assert_close(trained.detach(), after)
    trained.sum().backward()


def test_the_seed_of_a_fresh_adapter_decides_its_factors(fresh_bank):
    first = fresh_bank.add_trainable("x", rank=2, seed=1)
    same = fresh_bank.add_trainable("y", rank=2, seed=1)
    other = fresh_bank.add_trainable("z", rank=2, seed=2)
    assert torch.equal(first[0], same[0])
    assert not torch.equal(first[0], other[0])
    assert all(a is b for a, b in zip(first, fresh_bank.parameters("x"), strict=True))


def test_removing_an_adapter_closes_its_column(fresh_bank, adapter_dirs, tiny_sd_dir, inputs):
    for name in ("a", "b"):
        fresh_bank.load(name, adapter_dirs[name])
    alone = blended(fresh_bank, torch.tensor([[0.0, 1.0]] * ROWS), inputs)
    fresh_bank.remove("a")
    assert fresh_bank.names == ("b",)
    torch.testing.assert_close(blended(fresh_bank, torch.ones(ROWS, 1), inputs), alone, rtol=1e-6, atol=1e-6)
    fresh_bank.remove("b")
    base = load_model(tiny_sd_dir).unet(inputs[0], inputs[1], encoder_hidden_states=inputs[2]).sample
    assert torch.equal(blended(fresh_bank, torch.zeros(ROWS, 0), inputs), base)


def test_an_overflowing_adapter_stays_out_of_the_rows_that_do_not_use_it(
    fresh_bank, adapter_dirs, tiny_lora, tmp_path, inputs
):
    fresh_bank.load("b", adapter_dirs["b"])
    alone = blended(fresh_bank, torch.ones(ROWS, 1), inputs)
    huge = {key: value * 1e38 for key, value in load_file(tiny_lora(tmp_path, 9) / WEIGHT_NAME).items()}
    save_file({key: value.clamp(-3e38, 3e38) for key, value in huge.items()}, tmp_path / WEIGHT_NAME)
    fresh_bank.load("huge", tmp_path)
    mixed = blended(fresh_bank, torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]), inputs)
    assert not mixed[1].isfinite().all()
    torch.testing.assert_close(mixed[[0, 2]], alone[[0, 2]], rtol=1e-6, atol=1e-6)


def test_a_mix_of_the_wrong_shape_is_refused(tiny_bank, inputs):
    with pytest.raises(AdapterError, match=r"\(4, 2\): use \(4, 3\)"):
        tiny_bank.forward(*inputs, torch.zeros(ROWS, 2))
