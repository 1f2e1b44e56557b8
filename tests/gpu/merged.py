"""The path not taken: each adapter merged into its own copy of the adapted layers, W + scale B A, stacked."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from blend.adapters import AdapterBank


@dataclass
class MergedCall:
    """How the rows of the forward under way find their weights."""

    groups: Sequence[tuple[int, int, int]] = ()  # (source, first row, last row + 1): rows sorted by source
    index: Tensor | None = None  # [R] source of each row, whose weights are gathered
    mix: Tensor | None = None  # [R, K] of soup rows, whose weights were mixed ahead
    mixed: dict[str, Tensor] = field(default_factory=dict)  # layer -> [R, in, out]


class MergedLinear(nn.Linear):
    """An nn.Linear with one weight per source: the base, then each adapter."""

    def __init__(self, linear: nn.Linear, name: str, stack: Tensor, call: MergedCall) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        self.weight = nn.Parameter(stack, requires_grad=False)  # [K + 1, out, in]
        self.name, self.call = name, call

    def forward(self, x: Tensor) -> Tensor:
        call = self.call
        if call.mixed:
            return self._bmm(x, call.mixed[self.name])
        if call.index is not None:
            return self._bmm(x, self.weight[call.index].transpose(1, 2))
        output = x.new_empty(*x.shape[:-1], self.out_features)
        for source, first, last in call.groups:
            output[first:last] = functional.linear(x[first:last], self.weight[source], self.bias)
        return output

    def _bmm(self, x: Tensor, weights: Tensor) -> Tensor:
        output = torch.bmm(x.reshape(x.shape[0], -1, x.shape[-1]), weights)
        return (output if self.bias is None else output + self.bias).view(*x.shape[:-1], -1)


def merge(net: nn.Module, bank: AdapterBank) -> MergedCall:
    """Give `net`, a copy of the bank's UNet or that UNet itself, K + 1 weights in every adapted layer."""
    call = MergedCall()
    adapters = bank.factors()
    for name in adapters[0]:
        linear = net.get_submodule(name)
        products = [factors[name].up[0].t() @ factors[name].down[0] for factors in adapters]
        stack = torch.stack([linear.weight, *(linear.weight + product for product in products)])
        net.set_submodule(name, MergedLinear(linear, name, stack, call))
    return call


def group(call: MergedCall, sources: Tensor) -> None:
    """Rows [R] sorted by source run source by source."""
    values, counts = sources.unique_consecutive(return_counts=True)
    last = counts.cumsum(0).tolist()
    call.groups = [(int(v), end - int(c), end) for v, c, end in zip(values, counts, last, strict=True)]
    call.index, call.mixed = None, {}


def gather(call: MergedCall, sources: Tensor) -> None:
    """Rows [R] in any order gather their weights at every forward."""
    call.index, call.mixed = sources, {}


def premix(call: MergedCall, net: nn.Module, mix: Tensor) -> None:
    """Rows of soups [R, K] get weights of their own, made ahead."""
    for name, layer in net.named_modules():
        if isinstance(layer, MergedLinear):
            deltas = layer.weight[1:] - layer.weight[0]
            weights = layer.weight[0] + torch.einsum("rk,koi->roi", mix.to(deltas.dtype), deltas)
            call.mixed[name] = weights.transpose(1, 2).contiguous()
