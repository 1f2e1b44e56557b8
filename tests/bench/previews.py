"""What previews cost: the sprites' denoising loop with a preview of every sample at every step, and without any.

    python tests/bench/previews.py [--rounds N]

Both loops take turns in one process. The steps are timed apart from the previews: `step_ratio` says whether previews
slow the loop itself, `loop_ratio` what asking for all of them costs whoever asks.
"""

import argparse
import statistics
import time
from dataclasses import dataclass

import torch
from engine_parts.workload import Workload, open_workload, spread
from figures import write_figures

from blend.engine import BlendEngine
from blend.previews import LinearDecoder

SAMPLES, STEPS = 4, 10


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one loop."""

    steps: float
    previews: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    workload = open_workload()
    figures: dict[str, object] = {"samples": SAMPLES, "steps": STEPS, "rounds": rounds}
    for decoder in ("tiny", "linear"):
        engine = workload.fresh_engine(64)
        if decoder == "linear":
            stand_in_for_a_large_decoder(engine, workload)
        figures[decoder] = compare(engine, workload, rounds)
    figures["linear_ms_512px"] = 1000 * time_of(linear_at_512_pixels(), 50)
    write_figures("previews", figures)


def stand_in_for_a_large_decoder(engine: BlendEngine, workload: Workload) -> None:
    """Let the engine preview by the linear map, as it does for a model with a large decoder."""
    engine._previewer._linear = LinearDecoder(engine.model.latent_channels)
    outputs = engine.run([workload.sample(index, STEPS) for index in range(SAMPLES)])
    engine.decode([output.latents for output in outputs if output.latents is not None])


def compare(engine: BlendEngine, workload: Workload, rounds: int) -> dict[str, object]:
    plain, watched = [], []
    for _ in range(rounds + 1):
        plain.append(run_loop(engine, workload, previews=False))
        watched.append(run_loop(engine, workload, previews=True))
    # the first round warms up; a ratio within a round sees the same load on the machine
    pairs = list(zip(plain, watched, strict=True))[1:]
    shown = SAMPLES * (STEPS - 1)
    return {
        "step_ratio": spread([b.steps / a.steps for a, b in pairs]),
        "loop_ratio": spread([(b.steps + b.previews) / a.steps for a, b in pairs]),
        "step_ms": 1000 * statistics.median(a.steps for a, _ in pairs) / STEPS,
        "preview_ms": 1000 * statistics.median(b.previews for _, b in pairs) / shown,
    }


def run_loop(engine: BlendEngine, workload: Workload, *, previews: bool) -> Timing:
    tickets = [engine.submit(workload.sample(index, STEPS)) for index in range(SAMPLES)]
    steps = shown = 0.0
    while not engine.idle:
        start = time.perf_counter()
        finished = engine.step()
        middle = time.perf_counter()
        if previews:
            for ticket in tickets:
                if ticket not in finished:
                    engine.preview(ticket)
        steps, shown = steps + middle - start, shown + time.perf_counter() - middle
    return Timing(steps, shown)


def linear_at_512_pixels() -> LinearDecoder:
    linear = LinearDecoder(4)
    linear.observe(torch.randn(1, 4, 64, 64), torch.rand(1, 3, 512, 512))
    return linear


def time_of(linear: LinearDecoder, calls: int) -> float:
    """Median seconds of one decoding of [1, 4, 64, 64]."""
    latents, times = torch.randn(1, 4, 64, 64), []
    for _ in range(calls):
        start = time.perf_counter()
        linear.decode(latents)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


if __name__ == "__main__":
    main()
