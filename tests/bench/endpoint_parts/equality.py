"""Images made in company against the same images made alone in this process."""

import asyncio
import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from endpoint_parts.outcome import Outcome, by_status
from endpoint_parts.service import Service
from endpoint_parts.traffic import Answer, Mix, clients_of, closed_loop
from PIL import Image

from workers.engine_args import EngineArgs
from workers.generation import Opened, generate_png, plan, request_of
from workers.images import read_facts
from workers.loading import open_engine, pin

CONCURRENCY = 8


def run(
    service: Service, requests: int, *, steps: tuple[int, int] = (4, 20), say: Callable[[str], None] = print
) -> Outcome:
    """Ask for `requests` at a concurrency of 8, then make each image again, alone, from what it says of itself."""
    answers = asyncio.run(_ask(service, Mix(service.card(), "equality", steps=steps), requests))
    pictures = [image for answer in answers for image in answer.images]
    torch.set_num_threads(service.args.num_threads)
    figures = compare(pictures, open_alone(service.args), say)
    figures |= {"requests": requests, "concurrency": CONCURRENCY, "statuses": by_status(answers)}
    wrong = [f"{n} answers of status {s}" for s, n in figures["statuses"].items() if s != "200"]
    if service.args.deterministic and figures["mismatches"]:
        wrong.append(f"{figures['mismatches']} of {figures['images']} images differ from those made alone")
    return Outcome([replace(answer, images=()) for answer in answers], figures, wrong)


async def _ask(service: Service, mix: Mix, requests: int) -> list[Answer]:
    async with clients_of(service.url, service.tokens) as clients:
        return await closed_loop(clients.ask, mix.requests(requests), CONCURRENCY)


def open_alone(args: EngineArgs) -> Opened:
    """The same engine as the service's, in this process."""
    return open_engine(pin(args))


def compare(pictures: Sequence[bytes], opened: Opened, say: Callable[[str], None] = print) -> dict[str, Any]:
    """How many images are not bit-identical to their solo run, and by how much."""
    mismatches = differing = pixels = largest = 0
    for done, png in enumerate(pictures, start=1):
        [alone] = generate_png(plan(request_of(read_facts(png)), opened), opened)
        apart = np.abs(_levels(png) - _levels(alone))
        mismatches += bool(apart.any()) or read_facts(png) != read_facts(alone)
        differing += int(apart.any(axis=-1).sum())
        pixels += apart.shape[0] * apart.shape[1]
        largest = max(largest, int(apart.max()))
        if done % 50 == 0:
            say(f"{done} of {len(pictures)} images made again")
    return {
        "images": len(pictures),
        "mismatches": mismatches,
        "largest_difference": largest,
        "differing_pixels": round(differing / max(1, pixels), 6),
    }


def _levels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png))).astype(int)
