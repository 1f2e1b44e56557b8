"""Memory of one Stable Diffusion 1.5 pipeline with random weights: alone, and with K adapters by either path.

    PYTHONPATH=. python tests/gpu/memory.py --path low_rank --adapters 3
Encodes two prompts, runs one forward of 2 rows and decodes one image; prints one JSON line. Each path is a process of
its own, because a process never forgets its peak.
"""

import argparse
import json
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from measure import peak_bytes, reset_peak
from merged import MergedLinear, group, merge
from random_models import SHAPES, TOKENS, random_bank
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

PATHS = ("single", "low_rank", "merged")
ROWS = 2


def draw(kind: type[nn.Module], config: dict[str, Any], device: str, dtype: torch.dtype) -> Any:
    """A model whose weights never exist in another dtype or place than asked for."""
    with torch.device("meta"):
        model = kind(**config)
    model = model.to(dtype).to_empty(device=device).requires_grad_(False).eval()
    for parameter in model.parameters():
        parameter.uniform_(-0.02, 0.02)
    return model


@torch.no_grad()
def run(path: str, adapters: int, size: str, pixels: int, device: str, dtype: torch.dtype) -> dict[str, Any]:
    shape, where = SHAPES[size], torch.device(device)
    reset_peak(where)
    start = peak_bytes(where)
    text_encoder = CLIPTextModel(CLIPTextConfig(**shape.text)).to(where, dtype).eval()
    vae = draw(AutoencoderKL, shape.vae, device, dtype)
    unet = draw(UNet2DConditionModel, {"sample_size": shape.side(pixels), **shape.unet}, device, dtype)
    text = text_encoder(torch.randint(0, 256, (ROWS, TOKENS), device=where))[0].to(dtype)
    side, timesteps = shape.side(pixels), torch.full((ROWS,), 500, device=where)
    sample, mix = torch.randn(ROWS, 4, side, side).to(where, dtype), torch.eye(max(adapters, ROWS))[:ROWS, :adapters]
    if path == "low_rank":
        bank = random_bank(unet, adapters)
        kept = bank.encode_text(text)
        prediction = bank.forward(sample, timesteps, text, mix, kept, torch.arange(ROWS))
    else:
        if path == "merged":
            group(merge(unet, random_bank(unet, adapters)), torch.arange(ROWS) + 1)
        prediction = unet(sample, timesteps, encoder_hidden_states=text, return_dict=False)[0]
    vae.decode(prediction[:1], return_dict=False)
    models = {"unet": unet, "vae": vae, "text_encoder": text_encoder}
    weights = {name: sum(p.nbytes for p in model.parameters()) for name, model in models.items()}
    if path == "low_rank":
        weights["adapters"] = sum(
            factor.nbytes for layer in bank.factors() for pair in layer.values() for factor in pair
        )
    merged = sum(module.weight.nbytes for module in unet.modules() if isinstance(module, MergedLinear))
    return {
        "path": path,
        "adapters": adapters,
        "size": size,
        "pixels": pixels,
        "dtype": str(dtype).removeprefix("torch."),
        "weight_bytes": sum(weights.values()),
        "merged_bytes": merged,
        "peak_bytes": peak_bytes(where) - start,  # beyond the interpreter and its libraries
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--path", choices=PATHS, required=True)
    parser.add_argument("--adapters", type=int, default=3)
    parser.add_argument("--size", choices=("sd15", "tiny"), default="sd15")
    parser.add_argument("--pixels", type=int, default=256)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    options = parser.parse_args(arguments)
    dtype = getattr(torch, options.dtype)
    print(json.dumps(run(options.path, options.adapters, options.size, options.pixels, options.device, dtype)))


if __name__ == "__main__":
    main()
