"""The whole endpoint, Ray Serve and HTTP included: under overload, beside its rivals, and among clients that misbehave.

    overload     twice as many requests as it can answer, for minutes: answers, refusals, queue, memory
    equality     images made at a concurrency of eight beside the same ones made alone, pixel by pixel
    rivals       speed beside one request at a time and beside `@serve.batch`, by turns, over the same HTTP
    disconnects  clients that close the connection while their images are made
    fuzz         cases from the endpoint's own /openapi.json, and hostile bodies

With --only the figures of the other parts stay as they were measured last; `measured` says when each was. The exit
status is 1 when a promise did not hold. All requests go to this machine.
"""

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

# the replicas' processes inherit it: two contended OpenMP threads are far slower than one
os.environ.setdefault("OMP_NUM_THREADS", "1")

from endpoint_parts import disconnects, equality, fuzz, overload, rivals
from endpoint_parts.outcome import Outcome
from endpoint_parts.service import Stage, open_stage
from figures import RESULTS, write_figures
from rich.console import Console
from rich.table import Table

MAX_QUEUE_S = 5.0
# where the queue is not what is measured
WIDE_QUEUE_S = 600.0
DETERMINISTIC = {"deterministic": True, "tile_rows": 8}
DISCONNECTS, SCHEMA_CASES, HOSTILE_CASES = 200, 300, 300
ROUNDS = 9
# of the requests: those to the service that is not deterministic, and those to each contestant in a round
DEFAULT_SHARE, ROUND_SHARE = 0.2, 0.08
FULL_REQUESTS = 500


def run_overload(stage: Stage, options: argparse.Namespace) -> Outcome:
    return overload.run(stage.serve(max_queue_s=MAX_QUEUE_S), 60 * options.minutes)


def run_equality(stage: Stage, options: argparse.Namespace) -> Outcome:
    """Bit by bit where that is promised; where it is not, by how much the images differ."""
    exact = equality.run(stage.serve(max_queue_s=WIDE_QUEUE_S, **DETERMINISTIC), options.requests, say=say)
    number = max(8, round(DEFAULT_SHARE * options.requests))
    default = equality.run(stage.serve(max_queue_s=WIDE_QUEUE_S), number, say=say)
    return Outcome(
        [*exact.answers, *default.answers],
        {**DETERMINISTIC, **exact.figures, "default": default.figures},
        [*exact.wrong, *default.wrong],
    )


def run_rivals(stage: Stage, options: argparse.Namespace) -> Outcome:
    each = max(16, round(ROUND_SHARE * options.requests))
    rounds = ROUNDS if options.requests >= FULL_REQUESTS else 3
    return rivals.run(stage.serve(max_queue_s=WIDE_QUEUE_S), rounds, each, say=say)


def run_disconnects(stage: Stage, options: argparse.Namespace) -> Outcome:
    return disconnects.run(stage.serve(max_queue_s=WIDE_QUEUE_S), DISCONNECTS)


def run_fuzz(stage: Stage, options: argparse.Namespace) -> Outcome:
    service = stage.serve(max_queue_s=MAX_QUEUE_S)
    basis = [adapter.name for adapter in service.card().basis]
    return fuzz.run(service.url, service.tokens, service.admin, basis, schema_cases=SCHEMA_CASES, hostile=HOSTILE_CASES)


PARTS: dict[str, Callable[[Stage, argparse.Namespace], Outcome]] = {
    "overload": run_overload,
    "equality": run_equality,
    "rivals": run_rivals,
    "disconnects": run_disconnects,
    "fuzz": run_fuzz,
}
SUMS = {"requests": "sent_in_all", "errors_5xx": "errors_5xx", "wrong": "wrong"}
# what the README quotes -> where it stands
HEADLINE = {
    "mismatches": ("equality", "mismatches"),
    "rss_slope_mb_per_min": ("overload", "rss_slope_mb_per_min"),
    "ratio_vs_serial": ("rivals", "ratio_vs_serial", "median"),
    "ratio_vs_serve_batch": ("rivals", "ratio_vs_serve_batch", "median"),
    "p50_ms": ("overload", "p50_ms"),
    "p99_ms": ("overload", "p99_ms"),
    "disconnects_leaked": ("disconnects", "disconnects_leaked"),
    "fuzz_cases": ("fuzz", "fuzz_cases"),
}


def measure(options: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """The parts that were asked for, on one cluster: figures of each, and what was wrong."""
    parts: dict[str, Any] = {}
    wrong: list[str] = []
    with open_stage() as stage:
        for part in options.only:
            say(part)
            try:
                outcome = PARTS[part](stage, options)
            except Exception as error:
                # the other parts take long, and say something all the same
                traceback.print_exc()
                wrong.append(f"{part} broke off: {error!r}")
                continue
            complaints = outcome.complaints()
            wrong += [f"{part}: {words}" for words in complaints]
            parts[part] = {
                "measured": f"{time.strftime('%Y-%m-%d')}: {' '.join(sys.argv)}",
                "sent_in_all": len(outcome.answers),
                "errors_5xx": outcome.errors_5xx,
                "wrong": len(complaints),
                "load_average": round(os.getloadavg()[1], 2),
                **outcome.figures,
            }
    return parts, wrong


def with_earlier(parts: dict[str, Any]) -> dict[str, Any]:
    """These parts, and those that were measured before and not now."""
    path = RESULTS / "endpoint.json"
    earlier = json.loads(path.read_text())["figures"] if path.exists() else {}
    return {part: parts.get(part) or earlier[part] for part in PARTS if part in parts or part in earlier}


def summed_up(parts: dict[str, Any]) -> dict[str, Any]:
    sums = {name: sum(part[key] for part in parts.values()) for name, key in SUMS.items()}
    return {**sums, **headline(parts), **parts}


def headline(parts: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, path in HEADLINE.items():
        value: Any = parts
        for key in path:
            value = value.get(key) if value is not None else None
        found[name] = value
    return found


def say(words: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {words}", flush=True)


def print_summary(figures: dict[str, Any]) -> None:
    table = Table("promise", "measured")
    queue = figures.get("overload", {})
    table.add_row("requests, of which failed (5xx)", f"{figures['requests']}, {figures['errors_5xx']}")
    if queue:
        table.add_row("queue p99, at most", f"{queue['queue_p99_s']} s, {queue['max_queue_s']:g} s")
        table.add_row("answered under overload, p50, p99", f"{figures['p50_ms']} ms, {figures['p99_ms']} ms")
        table.add_row("told to come back later", f"{queue['share_429']:.0%}")
        table.add_row("memory", f"{figures['rss_slope_mb_per_min']} MB a minute")
    for name in ("mismatches", "ratio_vs_serial", "ratio_vs_serve_batch", "disconnects_leaked", "fuzz_cases"):
        table.add_row(name, str(figures[name]))
    Console(width=100).print(table)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="of overload")
    parser.add_argument("--requests", type=int, default=FULL_REQUESTS, help="of equality; the rivals get a share each")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), metavar="PART", default=list(PARTS))
    return parser.parse_args()


def main() -> int:
    options = parse()
    parts, wrong = measure(options)
    figures = summed_up(with_earlier(parts))
    write_figures("endpoint", figures)
    print_summary(figures)
    for words in wrong:
        print(f"wrong: {words}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
