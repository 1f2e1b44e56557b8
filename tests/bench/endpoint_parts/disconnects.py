"""Clients that close the connection while their images are made: whether the engine is free again within a step."""

import asyncio
import random
import time
from typing import Any

from endpoint_parts.outcome import Outcome, percentile
from endpoint_parts.service import Service
from endpoint_parts.traffic import HUNG_UP, Answer, Clients, Mix, clients_of

GROUP = 8  # clients that are there at once
LONG = (150, 200)  # steps, so that none is answered before its client leaves
STAY_S = (0.2, 1.5)
POLL_S = 0.02
GRACE_S = 1.0  # for the connection's end to travel through proxy and ingress on a busy machine
GIVE_UP_S = 15.0


def run(service: Service, disconnects: int) -> Outcome:
    """Half of the clients stream. Wants a queue that takes all of a group in."""
    return asyncio.run(_run(service, disconnects))


async def _run(service: Service, disconnects: int) -> Outcome:
    mix = Mix(await asyncio.to_thread(service.card), "disconnects", steps=LONG, streamed=0.0, images=(1, 2))
    before = await asyncio.to_thread(service.figures)
    answers, freed, late = [], [], 0
    async with clients_of(service.url, service.tokens) as clients:
        for start in range(0, disconnects, GROUP):
            answers += await _leave_together(clients, mix, range(start, min(start + GROUP, disconnects)))
            seconds, bound = await _until_free(service)
            freed.append(seconds)
            late += seconds > bound
        leaked = (await asyncio.to_thread(service.figures))["in_flight"]
        after = await asyncio.to_thread(service.figures)
        last = await clients.ask(Mix(mix.card, "afterwards", steps=(2, 2)).request(0))
    figures = {
        "disconnects": disconnects,
        "disconnects_leaked": leaked,
        "aborted": after["aborted"] - before["aborted"],
        "finished": after["finished"] - before["finished"],
        "late": late,
        "freed_p50_s": percentile(freed, 50),
        "freed_max_s": percentile(freed, 100),
    }
    wrong = [f"{leaked} requests of clients that had left were in flight at the end"] if leaked else []
    if late:
        wrong.append(f"{late} groups of {GROUP} were not free within a step and {GRACE_S:g} s of grace")
    if refused := [answer for answer in answers if answer.status not in (200, HUNG_UP)]:
        wrong.append(f"{len(refused)} were answered {refused[0].status}: {refused[0].message}")
    if not last.ok:
        wrong.append(f"a request afterwards was answered {last.status}: {last.message}")
    return Outcome([*answers, last], figures, wrong)


async def _leave_together(clients: Clients, mix: Mix, numbers: range) -> list[Answer]:
    draws = random.Random(numbers.start)

    async def client(number: int) -> Answer:
        fields: dict[str, Any] = mix.request(number)
        if number % 2:
            fields |= {"stream": True, "partial_images": 3}
        name = clients.names[number % len(clients.names)] if clients.names else ""
        return await clients.hang_up(fields, draws.uniform(*STAY_S), name)

    return await asyncio.gather(*map(client, numbers))


async def _until_free(service: Service) -> tuple[float, float]:
    """Seconds until nothing is in flight, and what they may be: two steps of a full batch and some grace."""
    began = time.perf_counter()
    while True:
        figures = await asyncio.to_thread(service.figures)
        waited = time.perf_counter() - began
        if figures["in_flight"] == 0 or waited > GIVE_UP_S:
            return waited, 2 * service.args.max_rows / figures["rows_per_s"] + GRACE_S
        await asyncio.sleep(POLL_S)
