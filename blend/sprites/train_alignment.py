"""Trains the alignment reward's dual encoder on renders, with hard captions and corrupted pictures as negatives."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from blend.rewards.alignment import DualEncoder
from blend.sprites.captions import COLOURS, OBJECTS, Thing, write_caption
from blend.sprites.judge import render_any
from blend.sprites.vision import disturb

Things = tuple[Thing, ...]


def train_alignment(
    *, steps: int = 4000, batch: int = 48, seed: int = 2, on_step: Callable[[int, float], None] | None = None
) -> DualEncoder:
    """Train with InfoNCE both ways: each picture against all captions and its own near misses, each caption against
    all pictures, clean and corrupted."""
    torch.manual_seed(seed)  # initial weights only
    encoder = DualEncoder()
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=2e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for step in range(steps):
        images, things = render_any(batch, rng)
        images = disturb(images, generator)
        loss = _contrast(encoder, images, corrupt(images, generator), things, rng)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if on_step is not None:
            on_step(step, float(loss.detach()))
    return encoder.eval()


def near_misses(things: Things, rng: random.Random) -> list[Things]:
    """Captions that are almost right: another colour, another object, and colours or sides swapped."""
    index = rng.randrange(len(things))
    thing = things[index]
    recoloured = Thing(rng.choice([c for c in COLOURS if c != thing.colour]), thing.object)
    used = {other.object for other in things}
    renamed = Thing(thing.colour, rng.choice([o for o in OBJECTS if o not in used]))
    misses = [_replace(things, index, recoloured), _replace(things, index, renamed)]
    if len(things) == 2 and things[0].colour != things[1].colour:
        left, right = things
        misses.append((Thing(right.colour, left.object), Thing(left.colour, right.object)))
    else:
        misses.append(_replace(things, index, Thing(recoloured.colour, renamed.object)))
    return misses


def corrupt(images: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures [B, 3, H, W] that show nothing: shuffled patches, doubled exposures, confetti, or washed out."""
    count, _, height, width = images.shape
    kinds = torch.randint(4, (count,), generator=generator)
    spoiled = images.clone()
    for row, kind in enumerate(kinds.tolist()):
        if kind == 0:
            patches = functional.unfold(images[row : row + 1], 8, stride=8)
            order = torch.randperm(patches.shape[-1], generator=generator)
            spoiled[row] = functional.fold(patches[..., order], (height, width), 8, stride=8)[0]
        elif kind == 1:
            spoiled[row] = 0.5 * (images[row] + images[(row + 1) % count])
        elif kind == 2:
            blobs = torch.rand(1, 3, 8, 8, generator=generator)
            spoiled[row] = torch.lerp(images[row], functional.interpolate(blobs, size=(height, width))[0], 0.75)
        else:
            pale = images[row].mean((1, 2), keepdim=True).expand_as(images[row])
            spoiled[row] = torch.lerp(images[row], pale, 0.85)
    return spoiled


def _contrast(
    encoder: DualEncoder, images: Tensor, spoiled: Tensor, things: list[Things], rng: random.Random
) -> Tensor:
    count = len(things)
    misses = [write_caption(miss) for group in things for miss in near_misses(group, rng)]
    texts = encoder.embed_prompts([*(write_caption(group) for group in things), *misses])
    pictures = encoder.embed_images(torch.cat([images, spoiled]))
    scale = encoder.log_scale.clamp(max=4.0).exp()
    matched, hard = texts[:count], texts[count:].view(count, -1, texts.shape[-1])
    same = torch.tensor([[i != j and a == b for j, b in enumerate(things)] for i, a in enumerate(things)])
    of_picture = (pictures[:count] @ matched.T).masked_fill(same, -1.0)
    of_hard = (pictures[:count, None] * hard).sum(-1)
    of_caption = torch.cat([of_picture.T, matched @ pictures[count:].T], dim=1)
    target = torch.arange(count)
    return functional.cross_entropy(scale * torch.cat([of_picture, of_hard], dim=1), target) + (
        functional.cross_entropy(scale * of_caption, target)
    )


def _replace(things: Things, index: int, thing: Thing) -> Things:
    return (*things[:index], thing, *things[index + 1 :])


def measure_alignment(encoder: DualEncoder, *, count: int = 600, seed: int = 98) -> dict[str, float]:
    """Share of unseen renders whose own caption scores above a stranger's, above each near miss, and above the same
    caption with the corrupted picture."""
    rng = random.Random(seed)
    images, things = render_any(count, rng)
    spoiled = corrupt(images, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        pictures, bad = encoder.embed_images(images), encoder.embed_images(spoiled)
        own = encoder.embed_prompts([write_caption(group) for group in things])
        misses = [
            encoder.embed_prompts([write_caption(near_misses(group, rng)[kind]) for group in things])
            for kind in range(3)
        ]
    score = (pictures * own).sum(-1)

    def beats(other: Tensor) -> float:
        return float((score > other).float().mean())

    return {
        "stranger": beats((pictures * own.roll(1, 0)).sum(-1)),
        "recoloured": beats((pictures * misses[0]).sum(-1)),
        "renamed": beats((pictures * misses[1]).sum(-1)),
        "swapped": beats((pictures * misses[2]).sum(-1)),
        "corrupted": beats((bad * own).sum(-1)),
        "matched_mean": float(score.mean()),
        "stranger_mean": float((pictures * own.roll(1, 0)).sum(-1).mean()),
    }
