"""Runs one tile of UNet rows: eagerly, compiled, or as a CUDA graph of a few fixed sizes.

Compiled tiles and graphs read their rows from buffers that stay where they are. What is left over of a buffer holds
rows of an earlier tile, whose predictions nobody reads. Neither the numbers nor the layout of a batch reach the
captured region from the host: factors, and the text's keys and values, are buffers like the latents.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from blend.adapters import AdapterBank
from blend.heap import keep_freed_memory
from blend.text_kv import TextKV

SIZES = (6, 12, 24, 48)
_WARM_UPS = 3
_SLOTS = 16  # distinct (size, latent shape, ..) that are compiled or captured; any more run eagerly


@dataclass(frozen=True, slots=True)
class TileOptions:
    """How tiles run. The defaults are for a CPU, where compiling takes half a minute a shape."""

    compile: bool = False
    graphs: bool = False  # CUDA alone
    sizes: Sequence[int] = SIZES  # rows that tiles are padded to when compiled or captured
    # layout of the convolutions, None: on CUDA alone. On a CPU it gains 0 to 10 % and other rounding than diffusers'
    channels_last: bool | None = None
    backend: str = "inductor"  # torch.compile's backend
    compile_mode: str | None = None  # torch.compile's mode; it must leave CUDA graphs to us

    @property
    def fixed(self) -> bool:
        return self.compile or self.graphs


class Tiles:
    """Runs tiles of one bank. Not thread-safe."""

    def __init__(self, bank: AdapterBank, options: TileOptions | None = None) -> None:
        """channels_last changes the layout of the bank's UNet in place. ValueError for options that do not fit.

        On a CPU it calls `keep_freed_memory`, which is a setting of the process.
        """
        options = options or TileOptions()
        device = next(bank.unet.parameters()).device
        if options.graphs and device.type != "cuda":
            raise ValueError(f"graphs is True but the model is on {device}: use graphs=False off CUDA")
        if options.fixed and (not options.sizes or min(options.sizes) < 1):
            raise ValueError(f"sizes is {tuple(options.sizes)}: use at least one integer >= 1")
        if device.type == "cpu":
            keep_freed_memory()
        self.bank = bank
        self.options = options
        self._sizes = sorted(set(options.sizes))
        self._slots: dict[tuple[Any, ...], _Slot] = {}
        self._version = bank.version
        self._pool: Any = None
        channels_last = device.type == "cuda" if options.channels_last is None else options.channels_last
        self._format = torch.channels_last if channels_last else torch.contiguous_format
        if channels_last:
            bank.unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def padded(self, rows: int) -> int:
        """Return how many rows really run in a tile of `rows`."""
        return next((size for size in self._sizes if size >= rows), rows) if self.options.fixed else rows

    def fitting(self, rows: int, limit: int) -> int:
        """Return the largest tile of at most `rows` that runs no more than `limit` rows; at least 1."""
        if self.padded(rows) <= limit:
            return rows
        sizes = (size for size in self._sizes if self.options.fixed and size <= min(rows, limit))
        return max(sizes, default=max(1, min(rows, limit)))

    def run(
        self,
        sample: Tensor,
        timesteps: Tensor,
        encoder_hidden_states: Tensor,
        mix: Tensor,
        text: TextKV | None = None,
        text_rows: Tensor | None = None,
        added_cond_kwargs: Mapping[str, Tensor] | None = None,
        *,
        limit: int | None = None,
        kin: Tensor | None = None,
    ) -> Tensor:
        """Return the predictions [R, C, h, w] that `AdapterBank.forward` returns for the same rows.

        Rows are padded to a size of the options, of at most `limit`; tiles larger than all of them, and banks in
        training, run eagerly. kin as for `forward`; compiled tiles and graphs make nothing of it.
        """

        def eagerly() -> Tensor:
            embeds, added = encoder_hidden_states, added_cond_kwargs
            return self.bank.forward(sample, timesteps, embeds, mix, text, text_rows, added, kin)

        sample = sample.contiguous(memory_format=self._format)
        sizes = (size for size in self._sizes if size >= sample.shape[0] and (limit is None or size <= limit))
        size = next(sizes, None)
        if not self.options.fixed or size is None or self.bank.trainable:
            return eagerly()
        self.bank.check_mix(mix, sample.shape[0])
        rows = {"sample": sample, "timesteps": timesteps, "encoder_hidden_states": encoder_hidden_states}
        # two kinds of tile alone: rows of one adapter each, and rows that mix any number of them
        factors = self.bank.gather(mix, 1)
        factors = self.bank.gather(mix, mix.shape[1]) if len(factors) > 1 else factors
        rows.update((f"factors.{slot}", lines) for slot, lines in enumerate(factors))
        rows.update((f"added.{name}", value) for name, value in (added_cond_kwargs or {}).items())
        if text is not None and text_rows is not None:
            rows["text"] = text.mixed(text_rows, mix)
        slot = self._slot(size, rows, text)
        if slot is None:
            return eagerly()
        return slot.run(rows)

    def _slot(self, size: int, rows: Mapping[str, Tensor], text: TextKV | None) -> _Slot | None:
        if self._version != self.bank.version:
            self._slots, self._version = {}, self.bank.version
        key = (size, *((name, value.shape[1:], value.dtype) for name, value in rows.items()))
        if key not in self._slots:
            if len(self._slots) == _SLOTS:
                return None
            if self.options.graphs and self._pool is None:
                # graphs run one after the other, so that they can share their working memory
                self._pool = torch.cuda.graph_pool_handle()
            self._slots[key] = _Slot(self.bank, self.options, _buffers(size, rows, self._format), text, self._pool)
        return self._slots[key]


def _buffers(size: int, rows: Mapping[str, Tensor], sample_format: torch.memory_format) -> dict[str, Tensor]:
    device = rows["sample"].device
    # tensors made in inference mode could not be written outside it
    with torch.inference_mode(False):
        buffers = {name: torch.zeros(size, *v.shape[1:], dtype=v.dtype, device=device) for name, v in rows.items()}
        buffers["sample"] = buffers["sample"].contiguous(memory_format=sample_format)
    return buffers


class _Slot:
    """One size and shape of tile: its buffers and what runs on them."""

    def __init__(
        self, bank: AdapterBank, options: TileOptions, buffers: dict[str, Tensor], text: TextKV | None, pool: Any
    ) -> None:
        self._buffers = buffers
        self._graph: torch.cuda.CUDAGraph | None = None
        self._output: Tensor | None = None
        self._predict = _predictor(bank, text)
        self._compiled = options.compile
        if options.compile:
            self._predict = torch.compile(
                self._predict, fullgraph=True, dynamic=False, backend=options.backend, mode=options.compile_mode
            )
        if options.graphs:
            self._capture(pool)

    @torch.no_grad()
    def run(self, rows: Mapping[str, Tensor]) -> Tensor:
        """Return the predictions [R, C, h, w] of rows by name, each [R, ..]."""
        count = rows["sample"].shape[0]
        for name, value in rows.items():
            self._buffers[name][:count].copy_(value, non_blocking=True)
        if self._graph is None:
            return self._call()[:count]
        self._graph.replay()
        assert self._output is not None
        return self._output[:count].clone()

    def _call(self) -> Tensor:
        if not self._compiled:
            return self._predict(self._buffers)
        # every size and shape is an entry of its own in the one function's cache
        with torch._dynamo.config.patch(recompile_limit=4 * _SLOTS):
            return self._predict(self._buffers)

    @torch.no_grad()
    def _capture(self, pool: Any) -> None:
        # on a side stream, as CUDA graphs ask: compiling, choosing algorithms and first allocations stay outside
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                self._call()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool):
            self._output = self._call()


def _predictor(bank: AdapterBank, text: TextKV | None) -> Callable[[dict[str, Tensor]], Tensor]:
    # only the shapes of the text's lines: the slot outlives the prompts
    cut = None if text is None else text.lines

    def part(rows: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): value for name, value in rows.items() if name.startswith(prefix)}

    def predict(rows: dict[str, Tensor]) -> Tensor:
        return bank.predict(
            rows["sample"],
            rows["timesteps"],
            rows["encoder_hidden_states"],
            list(part(rows, "factors.").values()),
            cut.outputs(rows["text"]) if cut is not None else {},
            part(rows, "added."),
        )

    return predict
