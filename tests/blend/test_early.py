"""The first layers, run once for rows that they cannot tell apart, predict what all rows would."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file

from blend.adapters import AdapterBank
from blend.engine import BlendEngine, Sample
from blend.preference import Preference

SD = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 8,
    "cross_attention_dim": 32,
}
PLAIN_FIRST = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
CROSS_FIRST = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
ALL_PLAIN = {"down_block_types": ("DownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "UpBlock2D")}
TEXT_FIRST = {**CROSS_FIRST, "only_cross_attention": True}
SIMPLE_FIRST = {
    "down_block_types": ("SimpleCrossAttnDownBlock2D", "ResnetDownsampleBlock2D"),
    "up_block_types": ("ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
}
SDXL = {
    **PLAIN_FIRST,
    "transformer_layers_per_block": (1, 2),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 16,
}
TEXT_ADDED = {**PLAIN_FIRST, "addition_embed_type": "text", "addition_embed_type_num_heads": 4}
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


def bank_of(directory: Path, changes: dict, targets: tuple[str, ...]) -> AdapterBank:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**{**SD, **changes}).eval().requires_grad_(False)
    bank = AdapterBank(unet)
    for number in range(2):
        generator = torch.Generator().manual_seed(number)
        tensors = {}
        for name, layer in unet.named_modules():
            if isinstance(layer, torch.nn.Linear) and name.endswith(targets):
                rank = 2 + number
                tensors[f"unet.{name}.lora_A.weight"] = torch.randn(rank, layer.in_features, generator=generator) / 4
                tensors[f"unet.{name}.lora_B.weight"] = torch.randn(layer.out_features, rank, generator=generator) / 4
        path = directory / f"{number}.safetensors"
        save_file(tensors, path, metadata={"format": "pt"})
        bank.load(str(number), path)
    return bank


@contextmanager
def row_counts(unet: UNet2DConditionModel, *names: str):
    """Collect how many rows modules run."""
    seen: dict[str, int] = {}
    with ExitStack() as stack:
        for name in names:
            layer = unet.get_submodule(name)
            forward = layer.forward

            def counting(*args, name=name, forward=forward, **kwargs):
                seen[name] = next(iter([*args, *kwargs.values()])).shape[0]
                return forward(*args, **kwargs)

            layer.forward = counting
            stack.callback(delattr, layer, "forward")
        yield seen


MIXES = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.3, 0.5], [0.3, 0.5], [0.0, 0.0]])
FIRST_ATTENTION = {
    "plain": "down_blocks.1.attentions.0.transformer_blocks.0.attn1",
    "cross": "down_blocks.0.attentions.0.transformer_blocks.0.attn1",
}


@pytest.mark.parametrize(
    ("changes", "targets", "shared"),
    [
        (PLAIN_FIRST, ATTENTION, {"down_blocks.0": 3, "down_blocks.1.resnets.0": 3, FIRST_ATTENTION["plain"]: 9}),
        (CROSS_FIRST, ATTENTION, {"down_blocks.0.resnets.0": 3, FIRST_ATTENTION["cross"]: 9}),
        (ALL_PLAIN, ATTENTION, {"down_blocks.1": 3}),
        (TEXT_FIRST, ATTENTION, {"down_blocks.0.resnets.0": 3, FIRST_ATTENTION["cross"]: 16}),
        (SIMPLE_FIRST, ATTENTION, {"conv_in": 3, "down_blocks.0.resnets.0": 16}),
        (SDXL, ATTENTION, {"down_blocks.0": 3, FIRST_ATTENTION["plain"]: 9}),
        (TEXT_ADDED, ATTENTION, {"conv_in": 16, "down_blocks.0": 16}),
        (PLAIN_FIRST, ("down_blocks.0.resnets.0.time_emb_proj",), {"conv_in": 3, "down_blocks.0.resnets.0": 16}),
        (PLAIN_FIRST, ("time_embedding.linear_2",), {"conv_in": 3, "down_blocks.0": 16}),
        (PLAIN_FIRST, ("attentions.0.transformer_blocks.0.ff.net.2",), {FIRST_ATTENTION["plain"]: 9}),
    ],
    ids=["plain", "cross", "all plain", "text", "simple", "sdxl", "text added", "adapted resnet", "adapted time", "ff"],
)
def test_a_unet_predicts_the_same_with_its_first_layers_shared(tmp_path, changes, targets, shared):
    bank = bank_of(tmp_path, changes, targets)
    generator = torch.Generator().manual_seed(1)
    kin = torch.tensor([0] * 7 + [1] * 7 + [2] * 2)
    mix = torch.cat([MIXES, MIXES.flip(0), MIXES[:2]])
    sample = torch.randn(3, 4, 8, 8, generator=generator)[kin]
    timesteps = torch.tensor([7, 500, 900])[kin]
    embeds = torch.randn(16, 5, 32, generator=generator)
    added = {"text_embeds": torch.randn(3, 16, generator=generator)[kin], "time_ids": torch.ones(16, 6) * 8}
    options = {"added_cond_kwargs": added} if changes is SDXL else {}
    with torch.inference_mode():
        expected = bank.forward(sample, timesteps, embeds, mix, **options)
        with row_counts(bank.unet, *shared) as seen:
            got = bank.forward(sample, timesteps, embeds, mix, kin=kin, **options)
        again = bank.forward(sample, timesteps, embeds, mix, **options)
    assert seen == shared
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(again, expected)  # nothing is left behind


def test_a_failed_forward_leaves_nothing_behind(tmp_path):
    bank = bank_of(tmp_path, PLAIN_FIRST, ATTENTION)
    sample, timesteps, embeds = torch.randn(1, 4, 8, 8).repeat(4, 1, 1, 1), torch.full((4,), 9), torch.randn(4, 5, 32)
    with torch.inference_mode():
        expected = bank.forward(sample, timesteps, embeds, MIXES[:4])
        to_k = bank.unet.get_submodule(f"{FIRST_ATTENTION['plain']}.to_k")
        to_k.forward = lambda x: x[:, :0] @ x
        with pytest.raises(RuntimeError):
            bank.forward(sample, timesteps, embeds, MIXES[:4], kin=torch.zeros(4))
        del to_k.forward
        assert torch.equal(bank.forward(sample, timesteps, embeds, MIXES[:4]), expected)


def test_gradients_see_every_row(tmp_path):
    bank = bank_of(tmp_path, PLAIN_FIRST, ATTENTION)
    bank.add_trainable("x", rank=2)
    with row_counts(bank.unet, "conv_in") as seen:
        kin, rows = torch.zeros(2), (torch.zeros(2, 4, 8, 8), torch.zeros(2), torch.ones(2, 5, 32))
        bank.forward(*rows, torch.eye(3)[[2, 2]], kin=kin).sum().backward()
    assert seen == {"conv_in": 2}
    assert any(factor.grad.any() for factor in bank.parameters("x"))


@pytest.mark.parametrize(("kind", "rows"), [("sd", 2), ("sdxl", 4)])
def test_the_engine_shares_them_unless_it_is_deterministic(request, kind, rows):
    model, bank = (
        request.getfixturevalue(name)
        for name in {"sd": ("tiny_model", "tiny_bank"), "sdxl": ("tiny_sdxl_model", "tiny_sdxl_bank")}[kind]
    )
    preference = Preference.parse({"a": 0.6, "b": 0.4}, 0.5, basis=bank.names)
    options = {"num_inference_steps": 2, "negative_prompt": "x"}
    samples = [Sample(prompt, preference, 4, **options) for prompt in ("a cat", "dogs")]
    engines = {rows: BlendEngine(model, bank), 12: BlendEngine(model, bank, deterministic=True, tile_rows=12)}
    found = {}
    for count, engine in engines.items():
        with row_counts(model.unet, "conv_in") as seen:
            found[count] = torch.stack([output.latents for output in engine.run(samples)])
        assert seen == {"conv_in": count}
    torch.testing.assert_close(found[rows], found[12], rtol=0, atol=1e-5 * float(found[12].abs().max()))


def test_a_part_of_a_unet_takes_adapters_too(tmp_path):
    torch.manual_seed(0)
    part = torch.nn.Module()
    part.attention = torch.nn.Linear(4, 4)
    bank = AdapterBank(part.requires_grad_(False))
    assert bank.names == ()
