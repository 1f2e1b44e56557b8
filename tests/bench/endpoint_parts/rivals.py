"""Throughput and latency over HTTP of in-flight batching, one request at a time and `@serve.batch`, by turns."""

import asyncio
import base64
import time
from collections.abc import Callable
from contextlib import AsyncExitStack, ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from endpoint_parts.equality import open_alone
from endpoint_parts.outcome import Outcome, percentile
from endpoint_parts.rival_app import OneAtATime, PaddedBatches, WholeBatches, build_rival
from endpoint_parts.service import Service
from endpoint_parts.traffic import Answer, Ask, Mix, clients_of, closed_loop
from engine_parts.workload import spread

from workers.api import ANYONE, GenerationRequest, GenerationResponse
from workers.service import GenerationService

CONCURRENCY = 8
RIVALS = {"serial": OneAtATime, "serve_batch": WholeBatches, "serve_batch_padded": PaddedBatches}
OURS, ALONE = "in_flight", "engine_alone"


def run(service: Service, rounds: int, requests: int, *, say: Callable[[str], None] = print) -> Outcome:
    """`requests` of one mix per round to each contestant; `service` is ours, the rivals are brought up beside it."""
    torch.set_num_threads(service.args.num_threads)
    with ExitStack() as stack:
        urls = {OURS: service.url}
        for name, replica in RIVALS.items():
            urls[name] = stack.enter_context(_beside(service, name, replica))
        alone = GenerationService(open_alone(service.args), max_queue_s=service.args.max_queue_s)
        stack.callback(alone.close)
        alone.warm_up()
        return asyncio.run(_race(service, urls, alone, rounds, requests, say))


@contextmanager
def _beside(service: Service, name: str, replica: type):
    from ray import serve

    serve.run(build_rival(replica, service.args), name=name, route_prefix=f"/{name}")
    try:
        yield f"{service.url}/{name}"
    finally:
        serve.delete(name)


async def _race(
    service: Service,
    urls: dict[str, str],
    alone: GenerationService,
    rounds: int,
    requests: int,
    say: Callable[[str], None],
) -> Outcome:
    card = alone.opened.card
    mix, warm = Mix(card, "rivals", streamed=0.0), Mix(card, "warm", streamed=0.0, steps=(2, 4))
    times: dict[str, list[float]] = {}
    answers: dict[str, list[Answer]] = {}
    async with AsyncExitStack() as stack:
        asks: dict[str, Ask] = {ALONE: in_process(alone)}
        for name, url in urls.items():
            asks[name] = (await stack.enter_async_context(clients_of(url, service.tokens))).ask
        for ask in asks.values():
            await closed_loop(ask, warm.requests(CONCURRENCY), CONCURRENCY)
        for turn in range(rounds):
            wanted = mix.requests(requests, start=turn * requests)
            names = list(asks)
            # the order turns as well: none always runs after the same neighbour
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                began = time.perf_counter()
                got = await closed_loop(asks[name], wanted, CONCURRENCY)
                times.setdefault(name, []).append(time.perf_counter() - began)
                answers.setdefault(name, []).extend(replace(answer, images=()) for answer in got)
            say(f"round {turn + 1} of {rounds}: " + ", ".join(f"{name} {times[name][-1]:.1f} s" for name in names))
    wrong = [f"{name} answered {a.status}: {a.message}" for name, got in answers.items() for a in got if not a.ok]
    figures = {"rounds": rounds, "requests_per_round": requests, "concurrency": CONCURRENCY}
    return Outcome([a for got in answers.values() for a in got], figures | summarise(times, answers), wrong[:5])


def in_process(service: GenerationService) -> Ask:
    """The same engine and batching without HTTP and without Serve."""

    async def ask(fields: dict[str, Any]) -> Answer:
        began = time.perf_counter()
        answer = await service.generate(GenerationRequest.model_validate(fields), ANYONE)
        seconds = time.perf_counter() - began
        if isinstance(answer, GenerationResponse):
            images = tuple(base64.b64decode(one.b64_json) for one in answer.data)
            return Answer(200, seconds, images=images, usage=answer.usage.model_dump())
        wait = None if answer.retry_after_s is None else str(answer.retry_after_s)
        return Answer(answer.status, seconds, retry_after=wait, message=answer.message)

    return ask


def summarise(times: dict[str, list[float]], answers: dict[str, list[Answer]]) -> dict[str, Any]:
    """Each contestant's speed, and how many times ours the others took, round by round."""
    figures: dict[str, Any] = {
        f"ratio_vs_{name}": spread([theirs / ours for theirs, ours in zip(taken, times[OURS], strict=True)])
        for name, taken in times.items()
        if name != OURS
    }
    for name, got in answers.items():
        latencies = [1e3 * answer.seconds for answer in got]
        figures[name] = {
            "requests_per_s": round(len(got) / sum(times[name]), 3),
            "rows_per_s": round(sum(answer.usage.get("rows", 0) for answer in got) / sum(times[name]), 1),
            "p50_ms": percentile(latencies, 50),
            "p99_ms": percentile(latencies, 99),
            "outside_engine_p50_ms": percentile([_outside(answer) for answer in got if answer.ok], 50),
        }
    return figures


def _outside(answer: Answer) -> float:
    """Milliseconds of a request that were neither waiting for the engine nor its work."""
    return 1e3 * answer.seconds - sum(answer.usage[part] for part in ("queue_ms", "denoise_ms", "decode_ms"))
