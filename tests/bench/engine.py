"""The engine's speed beside the ways it replaces, on the shipped sprites bundle; and memory on the SD 1.5 architecture.

--quick is for trying the script out: its figures mean nothing and are not written.
"""

import argparse
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from engine_parts.machine import flops_per_row, loop_overhead, matmul_gflops
from engine_parts.memory import memory_figures
from engine_parts.policies import STEPS, InFlight, Server, Session, WholeRequests, take_turns
from engine_parts.rivals import Sequential, merged_unets, peft_loop
from engine_parts.workload import Workload, open_workload, spread
from figures import write_figures
from rich.console import Console
from rich.table import Table

THREADS = 1  # of every contestant, as in the services: on two cores either side would run two processes
MORE_THREADS = 2
CONCURRENT = (1, 2, 4, 8)
CONCURRENT_SHORT = (1, 4)  # where a rival's time is known from these
ROUND_STEPS = 6
MAX_ROWS = 64  # the engine's own default
SMALL_ROWS = 24
POISSON_LOAD = 0.9  # of what whole-request batching can take


@dataclass(frozen=True, slots=True)
class Effort:
    rounds: int
    saturation_s: float
    small_s: float
    poisson_s: float


FULL = Effort(rounds=9, saturation_s=32, small_s=14, poisson_s=60)
QUICK = Effort(rounds=2, saturation_s=10, small_s=5, poisson_s=10)


def check_equal_work(workload: Workload, rivals: dict[str, Sequential]) -> dict[str, float]:
    """Largest difference of latents between the engine and each rival; RuntimeError above 1e-3."""
    torch.set_num_threads(THREADS)
    samples = [workload.sample(index, 10) for index in range(3)]
    ours = torch.stack([output.latents for output in workload.engine.run(samples)])
    apart = {name: float((torch.stack(rival.run(samples)) - ours).abs().max()) for name, rival in rivals.items()}
    if max(apart.values()) > 1e-3:
        raise RuntimeError(f"the contestants do not do the same work: latents differ by {apart}")
    return apart


def race_requests(
    workload: Workload, rivals: dict[str, Sequential], threads: int, rounds: int, concurrent: Sequence[int]
) -> dict[str, Any]:
    """Seconds until a group of requests that arrive together is answered, engine and rivals by turns."""
    torch.set_num_threads(threads)
    contestants = {"engine": workload.engine.run, **{name: rival.run for name, rival in rivals.items()}}
    seconds: dict[tuple[str, int], list[float]] = {}
    peaks = []
    for turn in range(rounds):
        peaks.append(matmul_gflops())
        for size in concurrent:
            samples = [workload.sample(100 * turn + index, ROUND_STEPS) for index in range(size)]
            for name in list(contestants)[:: 1 if turn % 2 else -1]:
                if name == "peft_loop" and size not in CONCURRENT_SHORT:
                    continue
                began = time.perf_counter()
                contestants[name](samples)
                seconds.setdefault((name, size), []).append(time.perf_counter() - began)
    groups: dict[str, dict[str, Any]] = {}
    for (name, size), taken in seconds.items():
        group = groups.setdefault(f"concurrent_{size}", {})
        group[f"{name}_rows_per_s"] = round(size * workload.rows * ROUND_STEPS / spread(taken)["median"], 1)
        if name != "engine":
            group[f"ratio_vs_{name}"] = spread([b / a for a, b in zip(seconds["engine", size], taken, strict=True)])
    return {"threads": threads, "matmul_peak_gflops": round(max(peaks), 1), **groups}


def race_policies(workload: Workload, effort: Effort) -> dict[str, Any]:
    """In-flight against whole-request batching: throughput at saturation, latency there and under Poisson arrivals."""
    saturated = saturate(workload, effort.saturation_s, MAX_ROWS, pads=(True, False))
    rate = POISSON_LOAD * saturated["whole_request"]["requests_per_s"]
    sessions = {
        "in_flight": Session(InFlight(workload, MAX_ROWS), rate=rate),
        "whole_request": Session(WholeRequests(workload, MAX_ROWS), rate=rate),
    }
    take_turns(sessions, effort.poisson_s)
    return {
        "request_steps": list(STEPS),
        "max_rows": MAX_ROWS,
        "saturated": saturated,
        "small_max_rows": SMALL_ROWS,
        "saturated_small": saturate(workload, effort.small_s, SMALL_ROWS),
        "poisson_requests_per_s": round(rate, 3),
        "poisson": {name: session.figures() for name, session in sessions.items()},
    }


def saturate(
    workload: Workload, seconds: float, max_rows: int, pads: Sequence[bool] = (True,)
) -> dict[str, dict[str, Any]]:
    """Both policies with twice the requests that fit asked for at any time: the queue never empties."""
    names = {True: "whole_request", False: "whole_request_unpadded"}
    servers: dict[str, Server] = {"in_flight": InFlight(workload, max_rows)}
    servers |= {names[pad]: WholeRequests(workload, max_rows, pad=pad) for pad in pads}
    clients = 2 * (max_rows // workload.rows)
    sessions = {name: Session(server, clients=clients) for name, server in servers.items()}
    take_turns(sessions, 2)
    for session in sessions.values():
        session.restart_figures()
    take_turns(sessions, seconds)
    figures: dict[str, dict[str, Any]] = {name: session.figures() for name, session in sessions.items()}
    ours = figures["in_flight"]["sample_steps_per_s"]
    for name in figures.keys() - {"in_flight"}:
        # over the rival's batches, whose lengths differ
        figures[name]["ratio_by_batch"] = spread([ours / burst for burst in sessions[name].bursts])
    return figures


def headline(race: dict[str, Any], policies: dict[str, Any]) -> dict[str, Any]:
    """The ratios the README quotes, each above 1 where the engine is ahead."""
    alone, four = race["concurrent_1"], race["concurrent_4"]

    def tail(block: str) -> float:
        figures = policies[block]
        return round(figures["whole_request"]["latency_p95_s"] / figures["in_flight"]["latency_p95_s"], 4)

    def gain(block: str, name: str) -> float:
        figures = policies[block]
        return round(figures["in_flight"]["sample_steps_per_s"] / figures[name]["sample_steps_per_s"], 4)

    return {
        "ratio_vs_sequential_c1": alone["ratio_vs_sequential"]["median"],
        "ratio_vs_sequential_c4": four["ratio_vs_sequential"]["median"],
        "ratio_vs_peft_loop": alone["ratio_vs_peft_loop"]["median"],
        "ratio_vs_peft_loop_c4": four["ratio_vs_peft_loop"]["median"],
        "ratio_vs_whole_request": gain("saturated", "whole_request"),
        "ratio_vs_whole_request_small": gain("saturated_small", "whole_request"),
        "ratio_vs_whole_request_unpadded": gain("saturated", "whole_request_unpadded"),
        "p95_ratio_vs_whole_request": tail("saturated"),
        "p95_ratio_vs_whole_request_poisson": tail("poisson"),
    }


def measure(effort: Effort) -> dict[str, Any]:
    workload = open_workload()
    rivals = {"sequential": merged_unets(workload), "peft_loop": peft_loop(workload)}
    apart = check_equal_work(workload, rivals)
    say("requests at once")
    race = race_requests(workload, rivals, THREADS, effort.rounds, CONCURRENT)
    race_more = race_requests(workload, rivals, MORE_THREADS, effort.rounds // 2 + 1, CONCURRENT_SHORT)
    torch.set_num_threads(THREADS)
    say("loop overhead")
    overhead = {f"concurrent_{size}": loop_overhead(workload, size) for size in (1, 4, 12)}
    say("batching policies")
    policies = race_policies(workload, effort)
    gflop_per_row = flops_per_row(workload) / 1e9
    rows_per_s = max(group["engine_rows_per_s"] for name, group in race.items() if name.startswith("concurrent"))
    return {
        **headline(race, policies),
        "load_average": round(os.getloadavg()[1], 2),  # well above 1: others computed here too, trust ratios alone
        "threads": THREADS,
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
        "adapters": len(workload.basis),
        "rows_per_s": rows_per_s,
        "gflop_per_row": round(gflop_per_row, 4),
        "share_of_matmul_peak": round(rows_per_s * gflop_per_row / race["matmul_peak_gflops"], 4),
        "loop_overhead": overhead,
        "largest_latent_difference": apart,
        "requests": race,
        "requests_more_threads": race_more,
        "policies": policies,
    }


def say(what: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {what}", flush=True)


def print_ratios(figures: dict[str, Any]) -> None:
    """The tables of ratios: medians, with quartiles over the rounds or batches."""
    requests = Table("requests at once", "threads", "rows/s", "x K models", "x PEFT loop")
    for block in (figures["requests"], figures["requests_more_threads"]):
        for name, group in block.items():
            if name.startswith("concurrent"):
                ratios = [shown(group.get(f"ratio_vs_{rival}")) for rival in ("sequential", "peft_loop")]
                rate = f"{group['engine_rows_per_s']:.0f}"
                requests.add_row(name.removeprefix("concurrent_"), str(block["threads"]), rate, *ratios)
    policies = figures["policies"]
    batching = Table("load", "policy", "steps/s", "p95 s", "in flight gains x")
    for load in ("saturated", "saturated_small", "poisson"):
        for name, row in policies[load].items():
            p95 = f"{row['latency_p95_s']:.2f}"
            batching.add_row(load, name, f"{row['sample_steps_per_s']:.1f}", p95, shown(row.get("ratio_by_batch")))
    Console(width=100).print(requests, batching)


def shown(ratio: dict[str, float] | None) -> str:
    return f"{ratio['median']:.2f} ({ratio['p25']:.2f} to {ratio['p75']:.2f})" if ratio else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    figures = measure(QUICK if quick else FULL)
    print_ratios(figures)
    if quick:
        print({name: figure for name, figure in figures.items() if not isinstance(figure, dict)})
    else:
        write_figures("engine", {**figures, **memory_figures()}, update=True)


if __name__ == "__main__":
    main()
