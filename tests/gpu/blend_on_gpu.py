"""Laws and times of the adapter bank on a Stable Diffusion 1.5 sized UNet with random weights.

Needs torch, diffusers and peft's companions alone (no cluster, no download):
    PYTHONPATH=. python tests/gpu/blend_on_gpu.py --dtype bfloat16
"""

import argparse
import json
import time
from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from blend.adapters import AdapterBank

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Inputs:
    """A batch of UNet rows: latents [R, 4, s, s], timesteps [R], text [R, 77, D]."""

    latents: Tensor
    timesteps: Tensor
    text: Tensor

    def row(self, index: int) -> "Inputs":
        one = slice(index, index + 1)
        return Inputs(self.latents[one], self.timesteps[one], self.text[one])


def build(size: str, adapters: int, device: str, dtype: torch.dtype) -> AdapterBank:
    """A UNet of SD 1.5's shape ("sd15") or a small one ("tiny"), with adapters whose B is not zero."""
    torch.manual_seed(0)
    small = {"block_out_channels": (32, 64), "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")}
    small |= {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "cross_attention_dim": 64}
    shape = {"cross_attention_dim": 768} if size == "sd15" else small
    with torch.device(device):
        unet = UNet2DConditionModel(sample_size=64 if size == "sd15" else 16, **shape).to(dtype).eval()
    bank = AdapterBank(unet)
    for index in range(adapters):
        for parameter in bank.add_trainable(f"adapter{index}", rank=4, seed=index):
            parameter.requires_grad_(False).add_(0.02 * torch.randn_like(parameter))
    return bank


def draw(size: str, rows: int, device: str, dtype: torch.dtype) -> Inputs:
    generator = torch.Generator().manual_seed(1)
    side, width = (64, 768) if size == "sd15" else (16, 64)
    latents = torch.randn(rows, 4, side, side, generator=generator)
    text = torch.randn(rows, 77, width, generator=generator)
    timesteps = torch.randint(0, 1000, (rows,), generator=generator)
    return Inputs(latents.to(device, dtype), timesteps.to(device), text.to(device, dtype))


@torch.no_grad()
def forward(bank: AdapterBank, inputs: Inputs, mix: Tensor) -> Tensor:
    return bank.forward(inputs.latents, inputs.timesteps, inputs.text, mix).float()


def largest_deviation(bank: AdapterBank, inputs: Inputs, mix: Tensor) -> float:
    """How far rows of a mixed batch are from the same rows alone, relative to their size."""
    together = forward(bank, inputs, mix)
    alone = torch.cat([forward(bank, inputs.row(i), mix[i : i + 1]) for i in range(len(mix))])
    return float((together - alone).abs().max() / alone.abs().max())


def milliseconds(bank: AdapterBank, inputs: Inputs, mix: Tensor, repeats: int) -> float:
    def wait() -> None:
        if mix.is_cuda:
            torch.cuda.synchronize()

    forward(bank, inputs, mix)
    wait()
    began = time.perf_counter()
    for _ in range(repeats):
        forward(bank, inputs, mix)
    wait()
    return 1000 * (time.perf_counter() - began) / repeats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=("sd15", "tiny"), default="sd15")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32")
    parser.add_argument("--repeats", type=int, default=10)
    options = parser.parse_args()
    dtype, rows, results = DTYPES[options.dtype], 4, []
    for adapters in (1, 2, 4):
        bank = build(options.size, adapters, options.device, dtype)
        inputs = draw(options.size, rows, options.device, dtype)
        one_hot = torch.eye(adapters, device=options.device)[torch.arange(rows, device=options.device) % adapters]
        base = torch.zeros_like(one_hot)
        results.append(
            {
                "adapters": adapters,
                "deviation_mixed_vs_alone": largest_deviation(bank, inputs, one_hot),
                "base_ms": milliseconds(bank, inputs, base, options.repeats),
                "mixed_ms": milliseconds(bank, inputs, one_hot, options.repeats),
            }
        )
        print(json.dumps({"rows": rows, "dtype": options.dtype, "device": options.device, **results[-1]}))
    worst = max(result["deviation_mixed_vs_alone"] for result in results)
    limit = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}[options.dtype]
    if worst > limit:
        raise SystemExit(f"a mixed batch deviates by {worst:.2e} from its rows alone: more than {limit:.0e}")


if __name__ == "__main__":
    main()
