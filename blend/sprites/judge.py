"""The judge: a classifier of colours and objects, trained on renders, used for measuring samples and nothing else.

It never serves as a reward; what it says of a picture is what a careful person would say.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from blend.sprites.captions import COLOURS, OBJECTS, Thing, parse_caption, write_caption
from blend.sprites.scene import render_things
from blend.sprites.vision import ImageEncoder, any_things, disturb, load_half

WEIGHTS = Path(__file__).parent / "judge.safetensors"


@dataclass(frozen=True, slots=True)
class Verdict:
    """Per picture: are all colours right, all objects right, and each colour on the right object? bool [B] each."""

    colours: Tensor
    objects: Tensor
    binding: Tensor


class Judge(nn.Module):
    """Three places of a picture (alone, left, right), each with a colour and an object."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = ImageEncoder(192)
        self.colour = nn.Linear(192, 3 * len(COLOURS))
        self.object = nn.Linear(192, 3 * len(OBJECTS))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (colours [B, 3, 10], objects [B, 3, 16]) of images [B, 3, 64, 64] in [0, 1]."""
        features = self.encoder(images)
        return self.colour(features).unflatten(1, (3, -1)), self.object(features).unflatten(1, (3, -1))

    @torch.no_grad()
    def judge(self, images: Tensor, prompts: Sequence[str]) -> Verdict:
        """Compare pictures with the captions they were made from."""
        colours, objects = self(images)
        rows = [_judge_one(c.argmax(-1), o.argmax(-1), p) for c, o, p in zip(colours, objects, prompts, strict=True)]
        table = torch.tensor(rows, dtype=torch.bool)
        return Verdict(table[:, 0], table[:, 1], table[:, 2])


def _judge_one(colours: Tensor, objects: Tensor, prompt: str) -> tuple[bool, bool, bool]:
    things = parse_caption(prompt)
    places = [0] if len(things) == 1 else [1, 2]
    seen = [Thing(COLOURS[int(colours[place])], OBJECTS[int(objects[place])]) for place in places]
    right_colours = all(thing.colour == other.colour for thing, other in zip(seen, things, strict=True))
    right_objects = all(thing.object == other.object for thing, other in zip(seen, things, strict=True))
    return right_colours, right_objects, tuple(seen) == things


def load_judge(path: Path = WEIGHTS) -> Judge:
    """The shipped judge."""
    judge = Judge()
    load_half(judge, path)
    return judge.eval()


def train_judge(
    *, steps: int = 2500, batch: int = 64, seed: int = 1, on_step: Callable[[int, float], None] | None = None
) -> Judge:
    """Train on fresh disturbed renders, every colour-object pair included."""
    torch.manual_seed(seed)  # initial weights only
    judge = Judge()
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for step in range(steps):
        images, things = render_any(batch, rng)
        loss = _loss(judge, disturb(images, generator), things)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if on_step is not None:
            on_step(step, float(loss.detach()))
    return judge.eval()


def measure_accuracy(judge: Judge, *, count: int = 1000, seed: int = 99) -> dict[str, float]:
    """Share of unseen, undisturbed renders whose colours, objects and all facts are named right."""
    images, things = render_any(count, random.Random(seed))
    verdict = judge.judge(images, [write_caption(group) for group in things])
    return {
        "colours": float(verdict.colours.float().mean()),
        "objects": float(verdict.objects.float().mean()),
        "all": float(verdict.binding.float().mean()),
    }


def render_any(count: int, rng: random.Random) -> tuple[Tensor, list[tuple[Thing, ...]]]:
    """Renders [count, 3, 64, 64] in [0, 1] of any things, with the things."""
    things = [any_things(rng, pair_share=0.5) for _ in range(count)]
    pixels = torch.from_numpy(np.stack([render_things(group, rng) for group in things]))
    return pixels.permute(0, 3, 1, 2).float() / 255, things


def _loss(judge: Judge, images: Tensor, things: list[tuple[Thing, ...]]) -> Tensor:
    colours, objects = judge(images)
    rows, places, colour_ids, object_ids = [], [], [], []
    for row, group in enumerate(things):
        for place, thing in zip([0] if len(group) == 1 else [1, 2], group, strict=True):
            rows.append(row)
            places.append(place)
            colour_ids.append(COLOURS.index(thing.colour))
            object_ids.append(OBJECTS.index(thing.object))
    return functional.cross_entropy(colours[rows, places], torch.tensor(colour_ids)) + functional.cross_entropy(
        objects[rows, places], torch.tensor(object_ids)
    )
