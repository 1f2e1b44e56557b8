"""Linear layers that add low-rank factors per row, and what one forward tells all of them.

An adapted layer computes base(x) + sum_j (x A_j^T) B_j, where j runs over the adapters that the row at hand uses: their
factors are gathered per row ahead of the forward, all layers at once. A row pays for the adapters it uses, and one it
does not use cannot touch it. Knows neither files nor names of adapters: that is the bank's business.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from blend.lora_file import LoraLayer

_KEPT_BYTES = 128 * 2**20
_KEPT_TILES = 8


class Factors(NamedTuple):
    """One layer's factors per row."""

    down: Tensor  # A [R, r, in]
    up: Tensor  # B [R, r, out], the scale and the row's weight folded in

    def take(self, rows: Tensor) -> Factors:
        return Factors(self.down.index_select(0, rows), self.up.index_select(0, rows))


@dataclass(slots=True)
class Call:
    """What the forward under way tells the layers of one UNet; empty between forwards, which leaves the base."""

    factors: Sequence[Mapping[str, Factors]] = ()  # by slot and layer: slot j holds the j-th adapter that a row uses
    outputs: Mapping[str, Tensor] = field(default_factory=dict)  # [R, L, out] of layers that need not run (text K/V)
    rows: Tensor | None = None  # of the R, those that the layer under way sees; None: all

    def clear(self) -> None:
        self.factors, self.outputs, self.rows = (), {}, None


class AdaptedLinear(nn.Linear):
    """An nn.Linear that keeps the weights and the name of the one it replaces."""

    def __init__(self, linear: nn.Linear, name: str, call: Call) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.training = linear.training
        self.name = name
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        """x [R, .., in] -> [R, .., out]."""
        ready = self.call.outputs.get(self.name)
        if ready is not None:
            return ready
        output = functional.linear(x, self.weight, self.bias)
        for slot in self.call.factors:
            if self.name in slot:
                factors, rows = slot[self.name], self.call.rows
                add_low_rank(output, x, factors if rows is None else factors.take(rows))
        return output


def add_low_rank(output: Tensor, x: Tensor, factors: Factors) -> None:
    """Add (x A^T) B to output [R, .., out], in place: no temporary of the output's size."""
    rows = x.shape[0]
    hidden = torch.bmm(x.reshape(rows, -1, x.shape[-1]), factors.down.transpose(1, 2))
    output.view(rows, -1, output.shape[-1]).baddbmm_(hidden, factors.up)


def wrap(unet: nn.Module, name: str, call: Call) -> None:
    """Put an AdaptedLinear in the place of the UNet's layer `name`, unless it is one."""
    layer = unet.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    if not isinstance(layer, AdaptedLinear):
        unet.set_submodule(name, AdaptedLinear(layer, name, call))


def call_of(unet: nn.Module) -> Call:
    """Return the Call that the UNet's adapted layers listen to; a new one if it has none: banks may share a UNet."""
    for module in unet.modules():
        if isinstance(module, AdaptedLinear):
            return module.call
    return Call()


class Kept:
    """The tensors made last, by what they were made from, within bounds."""

    def __init__(self) -> None:
        self._kept: dict[Hashable, Tensor] = {}

    def get(self, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """Return what is kept for `key`, or make and keep it; what was made first is dropped first."""
        found = self._kept.get(key)
        if found is None:
            found = make()
            while len(self._kept) >= max(1, min(_KEPT_TILES, _KEPT_BYTES // max(1, found.nbytes))):
                self._kept.pop(next(iter(self._kept)))
            self._kept[key] = found
        return found


class FactorTable:
    """The factors of all adapters and layers: one line [N] per adapter, first every A, then every B."""

    def __init__(self, layers: Mapping[str, nn.Linear], adapters: Sequence[Mapping[str, LoraLayer]]) -> None:
        self._adapters = adapters
        members = {name: [one[name] for one in adapters if name in one] for name in layers}
        # adapters of lower rank, and those that leave a layer alone, are padded with zeros
        self._ranks = {name: max(factors.rank for factors in each) for name, each in members.items()}
        self._layers = layers
        self._downs = sum(rank * layers[name].in_features for name, rank in self._ranks.items())
        every = (factor for each in members.values() for one in each for factor in (one.down, one.up))
        self._trainable = [factor for factor in every if isinstance(factor, nn.Parameter)]
        self._table: Tensor | None = None
        self._made_for: tuple[Any, ...] = ()
        self._kept = Kept()

    @property
    def trainable(self) -> bool:
        """True when a factor may still change; a frozen parameter may not."""
        return any(factor.requires_grad for factor in self._trainable)

    def lines(self) -> Tensor:
        """Return [K + 1, N], the last line all zeros; with gradients when they are enabled and a factor wants them."""
        if self.trainable and torch.is_grad_enabled():
            return self._build()
        # a parameter's version counts its in-place updates; writes through .data escape it
        version = (self._dtype, *((factor._version, factor.data_ptr()) for factor in self._trainable))
        if self._table is None or version != self._made_for:
            # tensors made in inference mode could not be used by a later backward pass
            with torch.inference_mode(False), torch.no_grad():
                self._table, self._made_for = self._build(), version
                self._kept = Kept()
        return self._table

    def gather(self, mix: Tensor, slots: int = 0) -> list[Tensor]:
        """Return, for each slot, the lines [R, N] of the adapters that rows with mix [R, K] use.

        There are as many slots as adapters in the row that uses most, and at least `slots`.
        """
        table, rows = self.lines(), mix.tolist()
        used = [[(k, weight) for k, weight in enumerate(row) if weight != 0] for row in rows]
        found = []
        for slot in range(max(slots, *(len(row) for row in used))):
            pairs = tuple(row[slot] if slot < len(row) else (len(self._adapters), 1.0) for row in used)
            if table.requires_grad:
                found.append(self._take(table, pairs))
            else:
                found.append(self._kept.get(pairs, lambda pairs=pairs: self._take(table, pairs)))  # type: ignore[misc]
        return found

    def cut(self, lines: Tensor) -> dict[str, Factors]:
        """Cut lines [R, N] into the factors of every layer, as views."""
        shapes = [(rank, layer.in_features) for rank, layer in zip(self._ranks.values(), self._linears, strict=True)]
        shapes += [(rank, layer.out_features) for rank, layer in zip(self._ranks.values(), self._linears, strict=True)]
        parts = lines.split([rank * width for rank, width in shapes], dim=1)
        views = [part.view(-1, *shape) for part, shape in zip(parts, shapes, strict=True)]
        count = len(self._ranks)
        return {name: Factors(views[i], views[count + i]) for i, name in enumerate(self._ranks)}

    @property
    def _linears(self) -> list[nn.Linear]:
        return [self._layers[name] for name in self._ranks]

    @property
    def _dtype(self) -> torch.dtype:
        return self._linears[0].weight.dtype

    def _take(self, table: Tensor, pairs: Sequence[tuple[int, float]]) -> Tensor:
        lines = table.index_select(0, torch.tensor([k for k, _ in pairs], device=table.device))
        weights = torch.tensor([weight for _, weight in pairs], dtype=table.dtype)
        if bool((weights != 1).any()):
            lines[:, self._downs :].mul_(weights.to(table.device)[:, None])
        return lines

    def _build(self) -> Tensor:
        table = []
        for adapter in self._adapters:
            downs, ups = [], []
            for name, rank in self._ranks.items():
                layer, factors = self._layers[name], adapter.get(name)
                missing = rank if factors is None else rank - factors.rank
                if factors is not None:
                    downs.append(factors.down.flatten())
                    ups.append((factors.up * factors.scale).t().flatten())
                downs.append(layer.weight.new_zeros(missing * layer.in_features))
                ups.append(layer.weight.new_zeros(missing * layer.out_features))
            table.append(torch.cat([*downs, *ups]))
        return torch.stack([*table, torch.zeros_like(table[0])]).to(self._dtype)
