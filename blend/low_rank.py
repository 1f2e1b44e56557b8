"""Linear layers that add low-rank factors per row, and what one forward tells all of them.

An adapted layer computes base(x) + ((x A^T) * mix) B^T, with A [K r, in] and B [out, K r] stacked over the K adapters
and mix [rows, K] repeated over their ranks. Knows neither files nor names of adapters: that is the bank's business.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from blend.lora_file import LoraLayer


class Factors(NamedTuple):
    """One layer's adapters, stacked."""

    down: Tensor  # [K r, in]
    up: Tensor  # [out, K r], the scales folded in
    columns: Tensor  # [K r] the column of `mix` that each rank belongs to
    layout: tuple[int, ...]  # the same on the host: layers of one layout share one mix


class Share(NamedTuple):
    """A mix repeated over the ranks of one layout."""

    weight: Tensor  # [R, K r]
    unused: Tensor  # [R, K r] where weight is 0

    def spread(self, x: Tensor) -> Share:
        """Return views that broadcast against x [R, .., in]."""
        shape = (self.weight.shape[0], *[1] * (x.dim() - 2), self.weight.shape[1])
        return Share(self.weight.view(shape), self.unused.view(shape))


@dataclass(slots=True)
class Call:
    """What the forward under way tells the layers of one UNet; empty between forwards, which leaves the base."""

    factors: Mapping[str, Factors] = field(default_factory=dict)  # by layer name; empty when no row uses an adapter
    shares: Mapping[tuple[int, ...], Share] = field(default_factory=dict)  # by layout
    outputs: Mapping[str, Tensor] = field(default_factory=dict)  # [R, L, out] of layers that need not run (text K/V)

    def clear(self) -> None:
        self.factors, self.shares, self.outputs = {}, {}, {}


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
        factors = self.call.factors.get(self.name)
        if factors is None:
            return output
        return add_low_rank(output, x, factors, self.call.shares[factors.layout])


def add_low_rank(output: Tensor, x: Tensor, factors: Factors, share: Share) -> Tensor:
    """Add the adapters' part to output [R, .., out], in place."""
    weight, unused = share.spread(x)
    # an overflow in an adapter that a row does not use must stay out of that row: 0 * inf is not 0
    hidden = functional.linear(x, factors.down).mul_(weight).masked_fill_(unused, 0.0)
    flat = hidden.view(-1, hidden.shape[-1])
    # one fused product instead of a product, a temporary of the output's size and a sum
    output.view(-1, output.shape[-1]).addmm_(flat, factors.up.t())
    return output


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


class Stack:
    """The adapters of one layer, stacked; kept for inference and rebuilt when a trainable factor has changed."""

    def __init__(self, members: list[tuple[int, LoraLayer]], device: torch.device) -> None:
        self._members = [factors for _, factors in members]
        self._layout = tuple(k for k, factors in members for _ in range(factors.rank))
        # on the device from the start: a copy from the host would break a CUDA graph
        self._columns = torch.tensor(self._layout, device=device)
        self._trainable = [f for m in self._members for f in (m.down, m.up) if isinstance(f, nn.Parameter)]
        self._kept: Factors | None = None
        self._kept_for: tuple[Any, ...] = ()

    @property
    def trainable(self) -> bool:
        """True when a member may still change; a frozen parameter may not."""
        return any(factor.requires_grad for factor in self._trainable)

    def factors(self, dtype: torch.dtype) -> Factors:
        """Return the stacked factors; with gradients when they are enabled and a member is trainable."""
        if self._trainable and torch.is_grad_enabled():
            return self._build(dtype)
        # a parameter's version counts its in-place updates; writes through .data escape it
        version = (dtype, *((factor._version, factor.data_ptr()) for factor in self._trainable))
        if self._kept is None or version != self._kept_for:
            # tensors made in inference mode could not be used by a later backward pass
            with torch.inference_mode(False), torch.no_grad():
                self._kept, self._kept_for = self._build(dtype), version
        return self._kept

    def _build(self, dtype: torch.dtype) -> Factors:
        down = torch.cat([member.down for member in self._members])
        up = torch.cat([member.up * member.scale for member in self._members], dim=1)
        return Factors(down.to(dtype), up.to(dtype), self._columns, self._layout)


def shares_of(mix: Tensor, factors: Mapping[str, Factors]) -> dict[tuple[int, ...], Share]:
    """Repeat mix [R, K] over the ranks of every layout among `factors`."""
    shares: dict[tuple[int, ...], Share] = {}
    for one in factors.values():
        if one.layout not in shares:
            weight = mix.index_select(1, one.columns).to(one.down.dtype)
            shares[one.layout] = Share(weight, weight == 0)
    return shares
