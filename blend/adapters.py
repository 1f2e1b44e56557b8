"""K basis LoRA adapters on one base UNet, a different mixture of them on every row of one batch.

Each adapted nn.Linear computes base(x) + ((x A^T) * mix) B^T, with A [K r, in] and B [out, K r] stacked over the K
adapters and mix [rows, K] repeated over their ranks. A one-hot row is that adapter, a row of zeros is the base, and a
row w is the soup W + sum_i w_i scale_i B_i A_i: products are mixed, never factors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from blend.lora_file import BASE_HASH_KEY, AdapterError, LoraLayer, read_lora, write_lora

__all__ = ["ATTENTION_TARGETS", "AdapterBank", "AdapterError"]

ATTENTION_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


class AdapterBank:
    """The adapters of one UNet. Not thread-safe: one forward at a time."""

    def __init__(self, unet: nn.Module, *, base_hash: str | None = None) -> None:
        """Wrap `unet`, whose own weights stay untouched; base_hash: `model_hash` of its directory, if known.

        With a base_hash, adapters whose file names another base are refused.
        """
        self.unet = unet
        self._base_hash = base_hash
        self._modules = dict(unet.named_modules())
        self._adapters: dict[str, dict[str, LoraLayer]] = {}
        self._hooks: dict[str, torch.utils.hooks.RemovableHandle] = {}
        self._stacks: dict[str, _Stack] = {}
        self._mix: _Mix | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Adapter names in the order of the columns of `mix`."""
        return tuple(self._adapters)

    def load(self, name: str, path: str | Path) -> None:
        """Add the adapter stored at `path`: a .safetensors file or a directory holding one.

        Any nn.Linear of the UNet may be adapted, each with its own rank and alpha.
        Raises AdapterError for a taken name, an unreadable file, a layer this UNet lacks or has in another shape,
        a convolution, or an adapter of another base.
        """
        self._check_new(name)
        file = read_lora(path)
        stated = file.header.get(BASE_HASH_KEY)
        if self._base_hash and stated and stated != self._base_hash:
            raise AdapterError(
                f"adapter {name!r} was tuned from the base {stated[:12]}, not from {self._base_hash[:12]}:"
                " use an adapter of this base"
            )
        layers = {}
        for layer, factors in file.layers.items():
            linear = self._linear(layer, f"adapter {name!r}")
            down, up = factors.down, factors.up
            if down.shape[1:] != (linear.in_features,) or up.shape != (linear.out_features, factors.rank):
                raise AdapterError(
                    f"adapter {name!r}: layer {layer} maps {down.shape[1]} to {up.shape[0]} features, the base maps"
                    f" {linear.in_features} to {linear.out_features}: it was tuned from another base model"
                )
            device = linear.weight.device
            layers[layer] = LoraLayer(
                down.to(device, torch.float32), up.to(device, torch.float32), factors.alpha, factors.scale
            )
        self._add(name, layers)

    def add_trainable(
        self,
        name: str,
        *,
        rank: int,
        alpha: float | None = None,
        target_modules: Sequence[str] = ATTENTION_TARGETS,
        seed: int = 0,
    ) -> list[nn.Parameter]:
        """Add a fresh float32 adapter and return its parameters, A and B by turns.

        A is drawn Kaiming-uniform under `seed`, B = 0. alpha defaults to rank, which makes the scale 1.
        target_modules are suffixes of layer names.
        """
        self._check_new(name)
        if rank < 1:
            raise AdapterError(f"rank is {rank}: use an integer >= 1")
        alpha = float(rank if alpha is None else alpha)
        for target in target_modules:
            if not any(_targets(layer, target) for layer in self._modules):
                raise AdapterError(
                    f"no layer of this UNet is named {target!r}: use layer names such as to_q or to_out.0"
                )
        generator = torch.Generator().manual_seed(seed)
        layers = {}
        for layer in self._modules:
            if not any(_targets(layer, target) for target in target_modules):
                continue
            linear = self._linear(layer, f"adapter {name!r}")
            down = torch.empty(rank, linear.in_features)
            nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)
            device = linear.weight.device
            up = torch.zeros(linear.out_features, rank, device=device)
            layers[layer] = LoraLayer(nn.Parameter(down.to(device)), nn.Parameter(up), alpha, alpha / rank)
        self._add(name, layers)
        return self.parameters(name)

    def parameters(self, name: str) -> list[nn.Parameter]:
        """Return the parameters of a trainable adapter, always in the same order; empty for a loaded one."""
        factors = [factor for layer in self._layers_of(name).values() for factor in (layer.down, layer.up)]
        return [factor for factor in factors if isinstance(factor, nn.Parameter)]

    def remove(self, name: str) -> None:
        """Forget an adapter; the columns of `mix` close up."""
        self._layers_of(name)
        del self._adapters[name]
        self._rewire()

    def save(self, name: str, directory: str | Path, metadata: Mapping[str, str] | None = None) -> Path:
        """Write the adapter as diffusers' `load_lora_weights` reads it and return the file's path."""
        header = dict(metadata or {})
        if self._base_hash:
            header.setdefault(BASE_HASH_KEY, self._base_hash)
        return write_lora(directory, self._layers_of(name), header)

    def forward(self, sample: Tensor, timesteps: Tensor, encoder_hidden_states: Tensor, mix: Tensor) -> Tensor:
        """Return the UNet's prediction [R, C, h, w], adapters mixed per row.

        sample [R, C, h, w], timesteps [R], encoder_hidden_states [R, L, D], mix [R, K] in the order of `names`.
        Gradients reach the trainable adapters.
        """
        if mix.shape != (sample.shape[0], len(self._adapters)):
            raise AdapterError(f"mix has shape {tuple(mix.shape)}: use {(sample.shape[0], len(self._adapters))}")
        # rows of the base alone need no adapter arithmetic; looking costs a synchronisation on a GPU
        idle = mix.shape[1] == 0 or (mix.device.type == "cpu" and not mix.any())
        previous, self._mix = self._mix, None if idle else _Mix(mix.to(sample.device))
        try:
            prediction: Tensor = self.unet(
                sample, timesteps, encoder_hidden_states=encoder_hidden_states, return_dict=False
            )[0]
        finally:
            self._mix = previous
        return prediction

    def _check_new(self, name: str) -> None:
        if name in self._adapters:
            raise AdapterError(f"adapter {name!r} is already there: remove it first or choose another name")

    def _layers_of(self, name: str) -> dict[str, LoraLayer]:
        if name not in self._adapters:
            raise AdapterError(f"no adapter {name!r}: use one of {', '.join(self._adapters) or '(none)'}")
        return self._adapters[name]

    def _linear(self, layer: str, who: str) -> nn.Linear:
        module = self._modules.get(layer)
        if module is None:
            raise AdapterError(f"{who}: this base has no layer {layer}: it was tuned from another base model")
        if not isinstance(module, nn.Linear):
            raise AdapterError(
                f"{who}: layer {layer} is a {type(module).__name__}: only nn.Linear layers can be blended;"
                f" train on {', '.join(ATTENTION_TARGETS)}"
            )
        return module

    def _add(self, name: str, layers: dict[str, LoraLayer]) -> None:
        self._adapters[name] = layers
        self._rewire()

    def _rewire(self) -> None:
        adapted = {layer for layers in self._adapters.values() for layer in layers}
        for layer in self._hooks.keys() - adapted:
            self._hooks.pop(layer).remove()
        for layer in adapted - self._hooks.keys():
            self._hooks[layer] = self._modules[layer].register_forward_hook(partial(self._add_delta, layer))
        self._stacks = {
            layer: _Stack([(k, layers[layer]) for k, layers in enumerate(self._adapters.values()) if layer in layers])
            for layer in adapted
        }

    def _add_delta(self, layer: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if self._mix is None:
            return None
        stack, x = self._stacks[layer], args[0]
        down, up = stack.factors(x.dtype)
        share, masked = self._mix.columns(stack.columns, x)
        hidden = functional.linear(x, down) * share
        # an overflow in an adapter that a row does not use must stay out of that row: 0 * inf is not 0
        return output + functional.linear(hidden.masked_fill(masked, 0.0), up)


def _targets(layer: str, target: str) -> bool:
    return layer == target or layer.endswith(f".{target}")


class _Stack:
    """The adapters of one layer, stacked; kept for inference and rebuilt when a trainable factor has changed."""

    def __init__(self, members: list[tuple[int, LoraLayer]]) -> None:
        self.columns = tuple(k for k, factors in members for _ in range(factors.rank))
        self._members = [factors for _, factors in members]
        self._trainable = [f for m in self._members for f in (m.down, m.up) if isinstance(f, nn.Parameter)]
        self._kept: tuple[Tensor, Tensor] | None = None
        self._kept_for: tuple[Any, ...] = ()

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return A [K r, in] and B [out, K r], the scales folded into B."""
        if self._trainable and torch.is_grad_enabled():
            return self._build(dtype)
        # a parameter's version counts its in-place updates; writes through .data escape it
        version = (dtype, *((factor._version, factor.data_ptr()) for factor in self._trainable))
        if self._kept is None or version != self._kept_for:
            # tensors made in inference mode could not be used by a later backward pass
            with torch.inference_mode(False), torch.no_grad():
                self._kept, self._kept_for = self._build(dtype), version
        return self._kept

    def _build(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        down = torch.cat([member.down for member in self._members])
        up = torch.cat([member.up * member.scale for member in self._members], dim=1)
        return down.to(dtype), up.to(dtype)


class _Mix:
    """One forward's mix, repeated over ranks once per distinct layout of columns."""

    def __init__(self, mix: Tensor) -> None:
        self._mix = mix
        self._columns: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}

    def columns(self, columns: tuple[int, ...], x: Tensor) -> tuple[Tensor, Tensor]:
        """Return share and masked, each [R, 1.., K r], to broadcast against x [R, .., in]."""
        key = (columns, x.dim(), x.dtype)
        if key not in self._columns:
            index = torch.tensor(columns, device=self._mix.device)
            share = self._mix.index_select(1, index).to(x.dtype)
            share = share.view(share.shape[0], *[1] * (x.dim() - 2), share.shape[1])
            self._columns[key] = (share, share == 0)
        return self._columns[key]
