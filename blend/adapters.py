"""K basis LoRA adapters on one base UNet, a different mixture of them on every row of one batch.

A one-hot row of `mix` is that adapter, a row of zeros is the base, and a row w is the soup
W + sum_i w_i scale_i B_i A_i: products are mixed, never factors. The arithmetic is in low_rank.py; merged copies of the
layers were no faster where it matters and cost 30 % more memory at K = 3 (tests/bench/adapter_paths.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from blend.early import EarlyLayers
from blend.lora_file import BASE_HASH_KEY, AdapterError, LoraLayer, read_lora, write_lora
from blend.low_rank import Factors, FactorTable, call_of, wrap
from blend.text_kv import TextKV, encode_text, text_layers

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
        self._call = call_of(unet)
        self._adapters: dict[str, dict[str, LoraLayer]] = {}
        self._table: FactorTable | None = None
        self.version = 0  # counts loads and removals: what is kept from before no longer holds
        self._text_layers = text_layers(unet)
        for layer in self._text_layers:
            wrap(unet, layer, self._call)
        self._modules = dict(unet.named_modules())
        self._early = EarlyLayers(unet, (), self._call)
        self._recomputing = False

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
        config: Any = self.unet.config
        # a UNet whose blocks differ in it is no SDXL, whose names alone need the number
        layers_per_block = config.layers_per_block if isinstance(config.layers_per_block, int) else 2
        file = read_lora(path, layers_per_block=layers_per_block)
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

    @property
    def trainable(self) -> bool:
        """True when an adapter may still change."""
        return self._table is not None and self._table.trainable

    def factors(self) -> list[dict[str, Factors]]:
        """Return each adapter's factors by layer, as of one row with weight 1."""
        if self._table is None:
            return []
        return [self._table.cut(line[None]) for line in self._table.lines()[: len(self._adapters)]]

    def gather(self, mix: Tensor, slots: int = 0) -> list[Tensor]:
        """Return the factors of rows with mix [R, K] for `predict`; at least `slots` tensors when there are adapters.

        mix is read on the host: on a GPU that waits for the device.
        """
        return [] if self._table is None else self._table.gather(mix, slots)

    def encode_text(self, embeds: Tensor) -> TextKV:
        """Return keys and values of the text rows `embeds` [P, L, D], for `forward`.

        They hold for the adapters as they are now: encode again after load, remove or a training step.
        """
        layers = {name: self._linear(name, "text") for name in self._text_layers}
        with torch.no_grad():
            return encode_text(layers, self.factors(), embeds)

    def forward(
        self,
        sample: Tensor,
        timesteps: Tensor,
        encoder_hidden_states: Tensor,
        mix: Tensor,
        text: TextKV | None = None,
        text_rows: Tensor | None = None,
        added_cond_kwargs: Mapping[str, Tensor] | None = None,
        kin: Tensor | None = None,
    ) -> Tensor:
        """Return the UNet's prediction [R, C, h, w], adapters mixed per row.

        sample [R, C, h, w], timesteps [R], encoder_hidden_states [R, L, D], mix [R, K] in the order of `names`,
        added_cond_kwargs: what else this UNet is conditioned on, each [R, ..].
        Gradients reach the trainable adapters. With `text`, row r takes the keys and values of its text row
        text_rows[r] [R] from there; AdapterError while an adapter is in training, which would leave them behind.
        kin [R]: rows with equal numbers have equal samples, timesteps and added conditioning. On a CPU their first
        layers run once, unless gradients are taken; it moves predictions by rounding.
        """
        self.check_mix(mix, sample.shape[0])
        if text is not None and self.trainable:
            raise AdapterError("keys and values kept for the text do not follow training: leave out `text`")
        lines = None if text is None or text_rows is None else text.mixed(text_rows, mix)
        # on a GPU it is not measured: eager tiles wait for launches there, and hooks add some
        learning = self.trainable and torch.is_grad_enabled()
        shared = kin is not None and sample.device.type == "cpu" and not learning
        with self._early.shared(kin.tolist(), mix.tolist()) if shared else nullcontext():  # type: ignore[union-attr]
            return self.predict(
                sample,
                timesteps,
                encoder_hidden_states,
                self.gather(mix),
                {} if text is None or lines is None else text.lines.outputs(lines),
                added_cond_kwargs or {},
            )

    def check_mix(self, mix: Tensor, rows: int) -> None:
        """Raise AdapterError unless mix is [rows, K]."""
        if mix.shape != (rows, len(self._adapters)):
            raise AdapterError(f"mix has shape {tuple(mix.shape)}: use {(rows, len(self._adapters))}")

    def predict(
        self,
        sample: Tensor,
        timesteps: Tensor,
        encoder_hidden_states: Tensor,
        factors: Sequence[Tensor],
        outputs: Mapping[str, Tensor],
        added_cond_kwargs: Mapping[str, Tensor],
    ) -> Tensor:
        """Run the UNet with what `forward` has prepared: factors as `gather` gives them, outputs of the text layers.

        Neither copies from the host nor waits for the device, so that it can be compiled and captured in a graph.
        """
        table = self._table
        self._call.factors = [] if table is None else [table.cut(lines) for lines in factors]
        self._call.outputs = outputs
        try:
            prediction: Tensor = self.unet(
                sample,
                timesteps,
                encoder_hidden_states=encoder_hidden_states,
                added_cond_kwargs=dict(added_cond_kwargs) or None,
                return_dict=False,
            )[0]
        finally:
            if not self._recomputing:
                self._call.clear()
        return prediction

    @contextmanager
    def recomputing(self) -> Iterator[None]:
        """Inside, a backward pass may run layers again (gradient checkpointing): the latest forward's rows stay."""
        self._recomputing = True
        try:
            yield
        finally:
            self._recomputing = False
            self._call.clear()

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
        self.version += 1
        adapted = {layer: None for layers in self._adapters.values() for layer in layers}
        for layer in adapted:
            wrap(self.unet, layer, self._call)
        self._modules = dict(self.unet.named_modules())
        layers = {layer: self._linear(layer, "adapters") for layer in adapted}
        self._table = FactorTable(layers, list(self._adapters.values())) if layers else None
        self._early = EarlyLayers(self.unet, adapted, self._call)


def _targets(layer: str, target: str) -> bool:
    return layer == target or layer.endswith(f".{target}")
