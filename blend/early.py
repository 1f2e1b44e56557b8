"""The first layers of a UNet, run once for all rows that they cannot tell apart.

The rows of one sample at one step share latents and timestep. Until the first layer that is adapted or sees the text
they compute the same thing, and the first self-attention tells adapters apart but not prompts. Hooks run those modules
on one row of each kind and copy what they return to the others: the forward stays diffusers' own.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_blocks import CrossAttnDownBlock2D, DownBlock2D
from torch import Tensor, nn

from blend.low_rank import Call

_EMBEDDINGS = ("time_embedding", "add_embedding")  # of what the first layers see beside the latents
_ADDITIONS = (None, "text_time")  # others embed the text itself


class EarlyLayers:
    """The leading modules of one UNet under the adapters of one bank."""

    def __init__(self, unet: nn.Module, adapted: Collection[str], call: Call) -> None:
        """adapted: names of the layers that any adapter touches."""
        self._call = call
        self._plain: list[nn.Module] = []  # see latents, timestep and added conditioning alone
        self._mixed: list[nn.Module] = []  # see the adapters too
        self._collect(unet, adapted)

    def _collect(self, unet: Any, adapted: Collection[str]) -> None:
        def touched(name: str) -> bool:
            return any(layer.startswith(f"{name}.") for layer in adapted)

        if not hasattr(unet, "config") or unet.config.addition_embed_type not in _ADDITIONS:
            return  # a part of a UNet, or one whose first layers see the text
        self._plain.append(unet.conv_in)
        if any(touched(name) for name in _EMBEDDINGS):
            return
        for index, block in enumerate(unet.down_blocks):
            if type(block) is DownBlock2D and not touched(f"down_blocks.{index}"):
                self._plain.append(block)
                continue
            if type(block) in (DownBlock2D, CrossAttnDownBlock2D) and not touched(f"down_blocks.{index}.resnets.0"):
                self._plain.append(block.resnets[0])
                self._mixed += _self_attention(block)
            return

    @contextmanager
    def shared(self, kin: Sequence[Hashable], mix: Sequence[Sequence[float]]) -> Iterator[None]:
        """Run the early layers once per kind of row while the context lasts; without gradients, on a CPU.

        kin [R]: rows with equal values have equal latents, timesteps and added conditioning; mix: [R, K].
        """
        kinds = [(one, tuple(weights)) for one, weights in zip(kin, mix, strict=True)]
        with ExitStack() as stack:
            for modules, group in ((self._plain, _Group(kin, None)), (self._mixed, _Group(kinds, self._call))):
                for module in modules if group.saves else ():
                    stack.callback(module.register_forward_pre_hook(group.take, with_kwargs=True).remove)
                    stack.callback(module.register_forward_hook(group.give).remove)
            yield


def _self_attention(block: Any) -> list[nn.Module]:
    """Return the first attention of a block, which sees no text, or nothing where that is not known."""
    attention: Any = block.attentions[0] if type(block) is CrossAttnDownBlock2D else None
    if type(attention) is not Transformer2DModel:
        return []
    first: Any = attention.transformer_blocks[0]
    return [first.attn1] if type(first) is BasicTransformerBlock and not first.only_cross_attention else []


class _Group:
    """Rows by kind, as hooks that take one row of each kind into a module and give its output to all."""

    def __init__(self, kinds: Sequence[Hashable], call: Call | None) -> None:
        """call: where adapted layers inside the modules look up which rows they see; None when there are none."""
        first: dict[Hashable, int] = {}
        for row, kind in enumerate(kinds):
            first.setdefault(kind, row)
        place = {kind: index for index, kind in enumerate(first)}
        self.saves = len(first) < len(kinds)
        self._first = torch.tensor(list(first.values()))
        self._back = torch.tensor([place[kind] for kind in kinds])
        self._call = call

    def take(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if self._call is not None:
            self._call.rows = self._first
        return _pick(args, self._first), {name: _pick(value, self._first) for name, value in kwargs.items()}

    def give(self, _: nn.Module, args: object, output: Any) -> Any:
        if self._call is not None:
            self._call.rows = None
        return _pick(output, self._back)


def _pick(value: Any, index: Tensor) -> Any:
    if isinstance(value, Tensor):
        return value.index_select(0, index)
    return tuple(_pick(part, index) for part in value) if isinstance(value, tuple) else value
