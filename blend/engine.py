"""BlendEngine: denoises many samples at once, each with its own prompt, preference, steps, guidance and seed.

Samples join and leave between any two steps. A step collects the rows that each sample planned (blend.plans), runs all
of them in a few tiles, sums them per sample and steps every sample at once.

What is guaranteed: a sample's noise depends on (seed, step) alone, and its result on its neighbours by rounding only
(in float32 within 1e-5 of its largest latent). With deterministic=True every forward has exactly tile_rows rows (fewer
for sizes whose tiles memory cuts), and on a CPU with one torch thread a sample's latents are bit-identical alone and in
any company.

Not thread-safe: one thread submits, steps and aborts.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from blend.adapters import AdapterBank
from blend.conditioning import Conditioning
from blend.courses import stand, take_step
from blend.ddim import DDIMStep, kl_of
from blend.footprint import Room
from blend.mixing import blend_predictions
from blend.model import DiffusionModel
from blend.plans import StepRows
from blend.previews import Previewer
from blend.running import DenoisingError, Output, Reference, Running, Trajectory, start
from blend.sample import Sample, SampleError
from blend.text_kv import TextCache
from blend.tiles import TileOptions, Tiles

__all__ = ["BlendEngine", "DenoisingError", "Output", "Sample", "SampleError", "Trajectory"]


class BlendEngine:
    """The denoising loop over one model and its adapters."""

    def __init__(
        self,
        model: DiffusionModel,
        bank: AdapterBank,
        *,
        max_rows: int = 64,
        tile_rows: int = 24,
        deterministic: bool = False,
        tiles: TileOptions | None = None,
        memory_bytes: int | None = None,
    ) -> None:
        """max_rows bounds the rows in flight, tile_rows those of one forward, memory_bytes what these may take.

        One sample is always let in, whatever its rows: they run in tiles. Sizes of which tile_rows rows do not fit the
        memory run in smaller tiles. memory_bytes defaults to 90 % of a GPU's free memory, or half of the machine's.
        deterministic=True pads every forward to the tile's rows: choose tile_rows small (4 to 8), a lone sample pays
        for all.
        """
        if max_rows < 1 or tile_rows < 1:
            raise ValueError(f"max_rows is {max_rows} and tile_rows {tile_rows}: use integers >= 1")
        self.model = model
        self.bank = bank
        self._max_rows = max_rows
        self._tile_rows = tile_rows
        self._deterministic = deterministic
        self._runner = Tiles(bank, tiles)
        self._room = Room(model, bank, wanted=self._runner.padded(tile_rows), memory_bytes=memory_bytes)
        self._text = TextCache(bank, steady=deterministic)
        self._tickets = itertools.count()
        self._previewer = Previewer(model)
        self._waiting: deque[Running] = deque()
        self._active: dict[int, Running] = {}
        self._batches: list[_Batch] | None = None

    @property
    def idle(self) -> bool:
        """True when no sample is waiting or in flight."""
        return not self._waiting and not self._active

    @property
    def free_rows(self) -> int:
        """Rows left for further samples before they have to wait; negative while some do."""
        return self._max_rows - sum(r.plan.peak_rows for r in (*self._active.values(), *self._waiting))

    def submit(self, sample: Sample) -> int:
        """Check the sample, queue it and return its ticket.

        Raises SampleError or PreferenceError (both ValueErrors), whose `param` names the field; also when not even one
        of its rows fits the memory.
        """
        running = self._start(sample)
        self._waiting.append(running)
        return running.ticket

    def abort(self, ticket: int) -> bool:
        """Drop a sample and free its rows at once; False when it is not waiting or in flight."""
        if self._active.pop(ticket, None) is not None:
            self._batches = None
            return True
        for running in self._waiting:
            if running.ticket == ticket:
                self._waiting.remove(running)
                return True
        return False

    def progress(self, ticket: int) -> tuple[int, int]:
        """Return (steps done, steps in all) of a sample that is waiting or in flight; KeyError otherwise."""
        running = self._find(ticket)
        return running.step, running.total

    def preview(self, ticket: int) -> Tensor | None:
        """Return the x_0 that a sample's latest step predicted, as an image in [0, 1]; None before its first step.

        [3, H, W] where the model's decoder is a tiny one; elsewhere one pixel per latent cell, [3, h, w], from a map
        fitted to this engine's own `decode` calls, or to one decoding of its own if there were none. All work is done
        here and none in step(). KeyError when the sample is not waiting or in flight.
        """
        origin = self._find(ticket).origin
        return None if origin is None else self._previewer.show(origin)

    def _start(self, sample: Sample) -> Running:
        running = start(next(self._tickets), sample, self.model, self.bank.names)
        self._room.check(running.latents.shape, running.conditioning)
        return running

    def _find(self, ticket: int) -> Running:
        for running in (*self._active.values(), *self._waiting):
            if running.ticket == ticket:
                return running
        raise KeyError(f"no sample with ticket {ticket} is waiting or in flight")

    @torch.inference_mode()
    def step(self) -> dict[int, Output]:
        """Take every sample in flight one step further; return the outputs of those that ended, by ticket."""
        self._admit()
        finished: dict[int, Output] = {}
        for batch in self._grouped():
            self._advance(batch)
            finished.update((r.ticket, r.output()) for r in batch.members if r.ended)
        if finished:
            self._active = {ticket: r for ticket, r in self._active.items() if ticket not in finished}
            self._batches = None
        return finished

    def run(self, samples: Iterable[Sample], on_step: Callable[[int, int], None] | None = None) -> list[Output]:
        """Denoise `samples` and return their outputs in order; on_step receives (sample steps done, in all).

        Raises what `submit` raises before any work, and RuntimeError when other samples are in flight.
        """
        if not self.idle:
            raise RuntimeError("run() needs an idle engine: step() the samples in flight to their end first")
        runs = [self._start(sample) for sample in samples]
        self._waiting.extend(runs)
        total = sum(r.total for r in runs)
        outputs: dict[int, Output] = {}
        try:
            while not self.idle:
                outputs.update(self.step())
                if on_step is not None:
                    on_step(sum(r.total if r.ended else r.step for r in runs), total)
        finally:
            for running in runs:
                self.abort(running.ticket)
        return [outputs[running.ticket] for running in runs]

    def decode(self, latents: Sequence[Tensor]) -> Tensor:
        """Return images [B, 3, H, W] in [0, 1] for latents [C, h, w] of one shape."""
        stacked = torch.stack(list(latents))
        images = self.model.decode(stacked)
        self._previewer.observe(stacked, images)
        return images

    def _admit(self) -> None:
        rows = sum(running.plan.peak_rows for running in self._active.values())
        while self._waiting and (not self._active or rows + self._waiting[0].plan.peak_rows <= self._max_rows):
            running = self._waiting.popleft()
            self._active[running.ticket] = running
            rows += running.plan.peak_rows
            self._batches = None

    def _grouped(self) -> list[_Batch]:
        # texts and dials change only when a sample joins or leaves
        if self._batches is None:
            shapes: dict[torch.Size, list[Running]] = {}
            for running in self._active.values():
                shapes.setdefault(running.latents.shape, []).append(running)
            self._batches = [
                _Batch(members, self._text, self._room.rows(shape, members[0].conditioning))
                for shape, members in shapes.items()
            ]
        return self._batches

    def _advance(self, batch: _Batch) -> None:
        rows = batch.rows()
        latents = torch.stack([running.latents for running in batch.members])
        timesteps = torch.stack([r.course.timesteps[r.step] for r in batch.members])
        try:
            preds = self._predict(batch, rows, latents, timesteps)
        except RuntimeError as error:  # out of memory, or a shape that the UNet cannot take
            for running in batch.members:
                running.fail(error)
            return
        at = stand([(r.course, r.step, r.origin) for r in batch.members], latents)
        taken = take_step(self.model, rows.predict(preds), latents, at, eta=batch.eta, noise=batch.draw_noise())
        references: list[Reference | None] = [None] * len(batch.members)
        if rows.measured:
            base_pred = blend_predictions(preds, rows.base_coefficients, rows.owner, len(batch.members))
            base = take_step(self.model, base_pred, latents, at, eta=batch.eta, noise=None)
            divergences = kl_of(taken.mean, base.mean, taken.std).tolist()
            references = [Reference(mean, kl) for mean, kl in zip(base.mean, divergences, strict=True)]
        _store(batch.members, taken, references)

    def _predict(self, batch: _Batch, rows: _BatchRows, latents: Tensor, timesteps: Tensor) -> Tensor:
        preds = []
        for tile in self._tiles(len(rows.owner), batch.room):
            owner, text = rows.owner[tile], rows.text[tile]
            conditioning = batch.conditioning.rows(text)
            preds.append(
                self._runner.run(
                    latents[owner.to(latents.device)].to(self.model.dtype),
                    timesteps[owner].to(latents.device),
                    conditioning.embeds,
                    rows.mix[tile],
                    batch.text,
                    text,
                    conditioning.added,
                    limit=batch.room,
                    # where a sample's rows share layers, their number depends on the neighbours in the tile
                    kin=None if self._deterministic else text if conditioning.added else owner,
                )
            )
        return torch.cat(preds)[: len(rows.owner)]

    def _tiles(self, rows: int, room: int) -> Sequence[Tensor]:
        size = self._runner.fitting(self._tile_rows, room)
        if not self._deterministic:
            # equal tiles: 26 rows run as 13 + 13, not as 24 + 2
            return torch.arange(rows).chunk(-(-rows // size))
        padded = -(-rows // size) * size
        return torch.arange(padded).clamp(max=rows - 1).split(size)


def _store(members: Sequence[Running], taken: DDIMStep, references: Sequence[Reference | None]) -> None:
    finite = taken.prev_sample.isfinite().flatten(1).all(1).tolist()
    for i, running in enumerate(members):
        running.advance(taken.prev_sample[i], taken.origin[i], taken.log_prob[i], references[i], finite[i])


class _Batch:
    """Samples of one latent shape, kept until one joins or leaves."""

    def __init__(self, members: list[Running], cache: TextCache, room: int) -> None:
        self.members = members
        self.room = room  # rows that fit the memory at once
        self._device = members[0].latents.device
        # [2 n]: each sample's negative prompt and prompt
        self.conditioning = Conditioning.cat([r.conditioning for r in members])
        self.text = cache.rows([prompt for r in members for prompt in r.prompts], self.conditioning.embeds)
        self.eta = torch.tensor([r.sample.eta for r in members], device=self._device)  # [n]
        self._rows: _BatchRows | None = None

    def rows(self) -> _BatchRows:
        """Return the rows of this step; most samples run the same rows at most steps."""
        planned = [r.rows for r in self.members]
        if self._rows is None or any(a is not b for a, b in zip(planned, self._rows.planned, strict=True)):
            self._rows = _BatchRows(self.members, planned)
        return self._rows

    def draw_noise(self) -> Tensor:
        """Return [n, C, h, w]; drawn on the CPU, so that a seed means the same on every device."""
        return torch.stack([r.draw_noise() for r in self.members]).to(self._device)


class _BatchRows:
    """The rows of one step of a batch, one sample's after the other's."""

    def __init__(self, members: Sequence[Running], planned: Sequence[StepRows]) -> None:
        self.planned = planned
        self.owner = torch.tensor([i for i, rows in enumerate(planned) for _ in rows.conditional])  # [R]
        self.text = 2 * self.owner + torch.tensor([seen for rows in planned for seen in rows.conditional])  # [R]
        self.mix = torch.cat([rows.mixes for rows in planned])  # [R, K]
        self.base_coefficients = torch.cat([rows.base_coefficients for rows in planned])  # [R]
        self.measured = bool(self.base_coefficients.any())  # by any member
        self._coefficients = torch.cat([rows.coefficients for rows in planned])  # [R]
        self._members = members
        self._keeping = [i for i, rows in enumerate(planned) if rows.keep is not None]
        self._keep = torch.cat([torch.zeros_like(r.coefficients) if r.keep is None else r.keep for r in planned])

    def predict(self, preds: Tensor) -> Tensor:
        """Return [n, C, h, w] from the rows' predictions [R, C, h, w]; takes and leaves the samples' residuals."""
        noise_pred = blend_predictions(preds, self._coefficients, self.owner, len(self.planned))
        for i, rows in enumerate(self.planned):
            kept = self._members[i].kept
            if rows.reuse and kept is not None:
                noise_pred[i] += rows.reuse * kept
        if self._keeping:
            residual = blend_predictions(preds, self._keep, self.owner, len(self.planned))
            for i in self._keeping:
                self._members[i].kept = residual[i]
        return noise_pred
