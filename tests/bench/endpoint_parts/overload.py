"""Twice as many requests as the endpoint can answer: some are answered in time, the others are told when to return."""

import asyncio
import random
import re
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from typing import Any

import numpy as np
from endpoint_parts.memory import MemoryWatch
from endpoint_parts.outcome import Outcome, percentile
from endpoint_parts.service import Service
from endpoint_parts.traffic import Answer, Clients, Mix, clients_of, closed_loop, open_loop

# more than the engine holds at once, so that its batch is full
CONCURRENCY = 24
EXCESS = 2.0
# of the arrivals: one client asks for more than its share
DEMAND = (4, 2, 1, 1)
NUMBERS = re.compile(r"\d+\.\d s of work are waiting, of at most \d.* needs \d+\.\d s")


def run(service: Service, seconds: float) -> Outcome:
    """Capacity for a tenth of `seconds`, then overload for all of them."""
    return asyncio.run(_run(service, seconds))


async def _run(service: Service, seconds: float) -> Outcome:
    mix = Mix(service.card(), "overload")
    async with clients_of(service.url, service.tokens) as clients:
        capacity, first = await measure_capacity(clients, mix, max(6.0, seconds / 10))
        ask = by_demand(clients)
        with MemoryWatch(service.processes()) as memory:
            requests = (mix.request(index) for index in count(1_000_000))
            answers = await open_loop(ask, requests, EXCESS * capacity["requests_per_s"], seconds)
        await asyncio.sleep(0.5)
    left = (await asyncio.to_thread(service.figures))["in_flight"]
    figures = {"capacity": capacity, **judge(answers, service.args.max_queue_s), "left_in_flight": left}
    figures["answered_per_s"] = round(figures["statuses"].get("200", 0) / seconds, 3)
    figures["asked_per_s"] = round(len(answers) / seconds, 3)
    figures["memory"] = memory.figures()
    figures["rss_slope_mb_per_min"] = figures["memory"]["all"]["mb_per_min"]
    return Outcome([*first, *answers], figures, faults(figures, left))


async def measure_capacity(clients: Clients, mix: Mix, seconds: float) -> tuple[dict[str, float], list[Answer]]:
    """Requests and UNet rows per second when a few clients always wait for an answer."""
    turns = count()

    async def ask(fields: dict[str, Any]) -> Answer:
        answer = await clients.ask(fields, clients.names[next(turns) % len(clients.names)])
        if not answer.ok:
            await asyncio.sleep(0.2)
        return replace(answer, images=())

    warm = await closed_loop(ask, mix.requests(CONCURRENCY, 500_000), CONCURRENCY)
    began = time.perf_counter()
    answers = await closed_loop(ask, (mix.request(index) for index in count()), CONCURRENCY, seconds=seconds)
    taken = time.perf_counter() - began
    done = [answer for answer in answers if answer.ok]
    figures = {
        "requests_per_s": round(len(done) / taken, 3),
        "rows_per_s": round(sum(answer.usage["rows"] for answer in done) / taken, 1),
        "latency_p50_ms": percentile([1e3 * answer.seconds for answer in done], 50),
        "latency_p99_ms": percentile([1e3 * answer.seconds for answer in done], 99),
        "concurrency": CONCURRENCY,
        "seconds": round(taken, 1),
    }
    return figures, [*warm, *answers]


def by_demand(clients: Clients):
    """Asks as one client or another, the first ones more often."""
    draws = random.Random("clients")

    async def ask(fields: dict[str, Any]) -> Answer:
        [name] = draws.choices(clients.names, DEMAND)
        return replace(await clients.ask(fields, name), images=())

    return ask


def judge(answers: Sequence[Answer], max_queue_s: float) -> dict[str, Any]:
    """What came back under overload, against what was promised."""
    done = [answer for answer in answers if answer.ok]
    refused = [answer for answer in answers if answer.status == 429]
    queued = [answer.usage["queue_ms"] / 1e3 for answer in done]
    latencies = [1e3 * answer.seconds for answer in done]
    return {
        "sent": len(answers),
        "statuses": {str(status): number for status, number in sorted(Counter(a.status for a in answers).items())},
        "share_429": round(len(refused) / max(1, len(answers)), 4),
        "bare_429": sum(not well_refused(answer) for answer in refused),
        "share_429_by_client": by_client(answers),
        "rows_by_client": rows_by_client(done),
        "refused_in_p50_ms": percentile([1e3 * answer.seconds for answer in refused], 50),
        "refused_in_p99_ms": percentile([1e3 * answer.seconds for answer in refused], 99),
        "queue_p50_s": percentile(queued, 50),
        "queue_p99_s": percentile(queued, 99),
        "queue_max_s": percentile(queued, 100),
        "max_queue_s": max_queue_s,
        "p50_ms": percentile(latencies, 50),
        "p99_ms": percentile(latencies, 99),
    }


def well_refused(answer: Answer) -> bool:
    """Whether a 429 says when to come back, and why in numbers."""
    told = answer.retry_after or ""
    return told.isdecimal() and int(told) >= 1 and NUMBERS.search(answer.message) is not None


def by_client(answers: Sequence[Answer]) -> dict[str, float]:
    names = sorted({answer.client for answer in answers})
    refused = {name: [a.status == 429 for a in answers if a.client == name] for name in names}
    return {name: round(statistics.fmean(one), 3) for name, one in refused.items()}


def rows_by_client(done: Sequence[Answer]) -> dict[str, float]:
    """Share of the rows that each client was given."""
    rows: Counter[str] = Counter()
    for answer in done:
        rows[answer.client] += answer.usage["rows"]
    total = max(1, sum(rows.values()))
    return {name: round(float(np.float64(rows[name]) / total), 3) for name in sorted(rows)}


def faults(figures: dict[str, Any], left: int) -> list[str]:
    wrong = [
        f"{n} answers of status {status}" for status, n in figures["statuses"].items() if status not in ("200", "429")
    ]
    if figures["bare_429"]:
        wrong.append(f"{figures['bare_429']} refusals without Retry-After or numbers")
    if not figures["queue_p99_s"] <= figures["max_queue_s"]:
        wrong.append(f"p99 of the queue is {figures['queue_p99_s']} s, promised were {figures['max_queue_s']:g} s")
    if left:
        wrong.append(f"{left} requests in flight after the last answer")
    return wrong
