"""Ways to run rows of different adapters in one forward, side by side: low-rank per row, merged weights, PEFT's own.

    PYTHONPATH=. python tests/gpu/adapter_paths.py --nets sprites sd15-block
Prints a JSON line per case: times relative to the plain base, all paths checked to agree.
"""

import argparse
import copy
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers.models import Transformer2DModel, UNet2DConditionModel
from merged import gather, group, merge, premix
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from random_models import random_bank
from torch import Tensor, nn

import blend.sprites
from blend.adapters import ATTENTION_TARGETS, AdapterBank
from blend.tiles import TileOptions, Tiles

RANK = 4
ROWS = (2, 6, 12, 24)
ADAPTERS = (1, 2, 3, 4)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


class Block(nn.Module):
    """One attention block of SD 1.5, 640 channels, with the face of a UNet."""

    channels, side, text = 640, 16, (77, 768)

    def __init__(self) -> None:
        super().__init__()
        self.block = Transformer2DModel(
            num_attention_heads=8, attention_head_dim=80, in_channels=640, norm_num_groups=32, cross_attention_dim=768
        )

    def forward(self, sample: Tensor, timesteps: Tensor, encoder_hidden_states: Tensor, **_: Any) -> tuple[Tensor]:
        return self.block(sample, encoder_hidden_states=encoder_hidden_states, return_dict=False)


class Sprites(UNet2DConditionModel):
    """The UNet of the shipped sprites base."""

    channels, side, text = 4, 16, (16, 64)


def open_net(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "sd15-block":
        return Block().requires_grad_(False).eval()
    base = Path(blend.sprites.__file__).parent / "base"
    return Sprites.from_pretrained(base, subfolder="unet").requires_grad_(False).eval()


def with_peft(net: nn.Module, bank: AdapterBank) -> nn.Module:
    """A copy of a plain net with the same adapters as PEFT's own layers."""
    for name, layers in zip(bank.names, bank.factors(), strict=True):
        config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(ATTENTION_TARGETS))
        inject_adapter_in_model(config, net, adapter_name=name)
        for layer, factors in layers.items():
            target = net.get_submodule(layer)
            target.lora_A[name].weight.data.copy_(factors.down[0])
            target.lora_B[name].weight.data.copy_(factors.up[0].t())
    return net.requires_grad_(False)


def name_adapters(names: list[str], module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, {**kwargs, "adapter_names": names}


class Case:
    """One net with K adapters and every way to run rows through it."""

    def __init__(self, net: str, adapters: int, device: str, dtype: torch.dtype) -> None:
        plain = open_net(net).to(device, dtype)
        self.device, self.dtype, self.plain = torch.device(device), dtype, plain
        self.bank = random_bank(copy.deepcopy(plain), adapters, RANK)
        self.tiles = Tiles(self.bank, TileOptions(channels_last=True))
        self.merged = copy.deepcopy(plain).to(memory_format=torch.channels_last)
        self.call = merge(self.merged, self.bank)
        self.peft = with_peft(copy.deepcopy(plain), self.bank).to(memory_format=torch.channels_last)
        plain.to(memory_format=torch.channels_last)

    def inputs(self, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(rows)
        net = self.plain
        sample = torch.randn(rows, net.channels, net.side, net.side, generator=generator).to(self.device, self.dtype)
        text = torch.randn(rows, *net.text, generator=generator).to(self.device, self.dtype)
        return sample.contiguous(memory_format=torch.channels_last), torch.full((rows,), 500).to(self.device), text

    def paths(self, rows: int, kind: str) -> dict[str, Callable[[], Tensor]]:
        """Every path over `rows` rows: "one-hot", adapter by adapter, or "soup"."""
        adapters, inputs = len(self.bank.names), self.inputs(rows)
        text = inputs[2]
        run = partial(self._run, inputs)
        sources = torch.arange(rows) * adapters // rows
        mix = torch.eye(adapters)[sources] if kind == "one-hot" else torch.rand(rows, adapters).softmax(1)
        kv, index = self.bank.encode_text(text), torch.arange(rows)
        found = {
            "base": lambda: run(self.plain),
            "low_rank": lambda: self.tiles.run(*inputs, mix),
            "low_rank_text_kept": lambda: self.tiles.run(*inputs, mix, kv, index),
        }
        if kind == "soup":
            return found | {"merged_rows": partial(self._merged, run, premix, self.merged, mix.to(self.device))}
        sources = sources.to(self.device) + 1
        names = [self.bank.names[k - 1] for k in sources.tolist()]
        return found | {
            "merged_groups": partial(self._merged, run, group, sources),
            "merged_gathered": partial(self._merged, run, gather, sources),
            "peft": partial(self._with_names, run, names),
        }

    def _run(self, inputs: tuple[Tensor, Tensor, Tensor], net: nn.Module) -> Tensor:
        return net(*inputs[:2], encoder_hidden_states=inputs[2], return_dict=False)[0]

    def _merged(self, run: Callable[[nn.Module], Tensor], arrange: Callable[..., None], *arguments: Any) -> Tensor:
        if arrange is not premix or self.call.mix is not arguments[-1]:
            arrange(self.call, *arguments)
            self.call.mix = arguments[-1]
        return run(self.merged)

    def _with_names(self, run: Callable[[nn.Module], Tensor], names: list[str]) -> Tensor:
        layers = [module for module in self.peft.modules() if isinstance(module, BaseTunerLayer)]
        hook = partial(name_adapters, names)
        hooks = [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in layers]
        try:
            return run(self.peft)
        finally:
            for one in hooks:
                one.remove()


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Wall time on a GPU; on a CPU the time of this process, which other processes disturb less."""
    if device.type != "cuda":
        began = time.process_time()
        call()
        return time.process_time() - began
    torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - began


@torch.inference_mode()
def compare(case: Case, rows: int, kind: str, repeats: int) -> dict[str, float]:
    """Median time of each path over the base's in the same turn; RuntimeError when paths disagree."""
    paths = case.paths(rows, kind)
    expected = paths["low_rank"]()
    scale = float(expected.abs().max())
    for name, path in paths.items():
        apart = float((path() - expected).abs().max()) / scale
        if name != "base" and apart > TOLERANCE[case.dtype]:
            raise RuntimeError(f"{name} and low_rank differ by {apart:.1e} of the largest value")
    taken: dict[str, list[float]] = {name: [] for name in paths}
    order = list(paths)
    for turn in range(repeats):
        random.Random(turn).shuffle(order)
        for name in order:
            taken[name].append(seconds(paths[name], case.device))
    base = taken.pop("base")
    ratios = {name: statistics.median(a / b for a, b in zip(each, base, strict=True)) for name, each in taken.items()}
    return {"base_ms": round(1000 * statistics.median(base), 2), **{name: round(r, 3) for name, r in ratios.items()}}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nets", nargs="+", default=["sprites", "sd15-block"], choices=("sprites", "sd15-block"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS))
    parser.add_argument("--adapters", nargs="+", type=int, default=list(ADAPTERS))
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args(arguments)
    if options.device == "cpu":
        torch.set_num_threads(1)
    for net in options.nets:
        for adapters in options.adapters:
            case = Case(net, adapters, options.device, getattr(torch, options.dtype))
            for rows in options.rows:
                for kind in ("one-hot", "soup"):
                    found = compare(case, rows, kind, options.repeats)
                    line = {"net": net, "adapters": adapters, "rows": rows, "kind": kind, **found}
                    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
