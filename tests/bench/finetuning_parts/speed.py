"""Images per second of rollout and update: blend.finetune's trainer beside a plain DDPO loop, by turns."""

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from finetuning_parts.ddpo_loop import DDPOLoop
from finetuning_parts.runs import run_config

from blend.finetune.config import TrainConfig
from blend.finetune.rollout import plan_requests
from blend.rewards import load_reward
from workers.bundles import resolve_base
from workers.training import TrainJob

BASIS = "colourfulness"  # whose run file says what both train
THREADS = 1
USUAL_BATCH = 8  # images that public DDPO trainers sample at a time
BATCHES = (4, 8, 16, 32, 96)
LARGEST_DEVIATION = 1e-4  # of a replayed step's ratio from 1, before the first update
MEANING = {
    "ratio_vs_ddpo_loop": "images/s over those of the plain loop that trains as many steps of each path as the run "
    f"file says, in its usual batches of {USUAL_BATCH} images",
    "ratio_vs_ddpo_loop_best_batch": "the same at the batch size at which the loop is fastest",
    "ratio_vs_ddpo_loop_all_steps": f"over the loop as it comes: every step trained, batches of {USUAL_BATCH}",
    "ratio_vs_ddpo_loop_all_steps_best_batch": "the same at its fastest batch size",
}


@dataclass(frozen=True, slots=True)
class Turn:
    """One contestant's one iteration over the global batch."""

    wall: float  # seconds
    cpu: float  # seconds of this process: less disturbed by others
    metrics: Mapping[str, float]


def race(rounds: int, batches: Sequence[int] = BATCHES, **changes: Any) -> dict[str, Any]:
    """The speed section's figures, medians over `rounds`; RuntimeError when a side does not replay what it sampled."""
    torch.set_num_threads(THREADS)
    config = run_config(BASIS, 0, held_out_images=2, **changes)
    job = TrainJob.prepare(config)
    trainer = job.trainer()
    trainer.evaluate()
    loop = DDPOLoop(resolve_base(config.base_model), config, load_reward(config.reward))

    def epoch(size: int, steps: int, turn: int) -> Mapping[str, float]:
        plan = plan_requests(config, job.prompts, turn)
        return loop.epoch([request.prompt for request in plan], size, steps)

    some, every = config.train_steps_per_sample, config.num_inference_steps
    replayed = {"trainer": trainer.iterate(), "ddpo_loop": epoch(USUAL_BATCH, some, 0)}
    deviations = {name: metrics["ratio_deviation"] for name, metrics in replayed.items()}
    if max(deviations.values()) > LARGEST_DEVIATION:
        raise RuntimeError(f"a replayed step has another probability: ratios differ from 1 by {deviations}")
    swept = sweep({size: partial(epoch, size, some) for size in sorted({USUAL_BATCH, *batches})})
    best = min(swept, key=lambda size: swept[size])
    cases = dict(zip(MEANING, [(USUAL_BATCH, some), (best, some), (USUAL_BATCH, every), (best, every)], strict=True))
    ours = "trainer", some
    contestants: dict[Any, Callable[[int], Mapping[str, float]]] = {ours: lambda turn: trainer.iterate()}
    contestants |= {case: partial(epoch, *case) for case in cases.values()}
    turns = take_turns(contestants, rounds)
    ratios = {key: ratios_of(turns[ours], turns[case], "wall") for key, case in cases.items()}
    return {
        **{key: ratio["median"] for key, ratio in ratios.items()},
        "speed": {
            "meaning": MEANING,
            "settings": settings_of(config),
            "trainer_images_per_s": rate(config.batch_size, turns[ours]),
            "ddpo_loop_images_per_s": {key: rate(config.batch_size, turns[case]) for key, case in cases.items()},
            "ratios": ratios,
            "ratios_of_cpu_time": {key: ratios_of(turns[ours], turns[case], "cpu") for key, case in cases.items()},
            "trainer_rollout_share": quartiles(
                [turn.metrics["rollout_seconds"] / turn.metrics["seconds"] for turn in turns[ours]]
            ),
            "ddpo_loop_rollout_share": {
                key: quartiles([turn.metrics["rollout_seconds"] / turn.wall for turn in turns[case]])
                for key, case in cases.items()
            },
            "ddpo_loop_images_per_cpu_s_by_batch": {
                size: round(config.batch_size / seconds, 3) for size, seconds in swept.items()
            },
            "ddpo_loop_best_batch": best,
            "replayed_ratio_deviation": deviations,
            "rounds": rounds,
            "load_average": round(os.getloadavg()[1], 2),  # well above 1: others computed here too, trust ratios alone
        },
    }


def sweep(epochs: Mapping[int, Callable[[int], Mapping[str, float]]]) -> dict[int, float]:
    """Seconds of processor time by batch size, once each: on a busy machine the clock would choose by chance."""
    seconds = {}
    for size, run in epochs.items():
        seconds[size] = take_turn(run, 0).cpu
        print(f"plain loop in batches of {size}: {seconds[size]:.1f} s of processor time", flush=True)
    return seconds


def take_turns(contestants: Mapping[Any, Callable[[int], Mapping[str, float]]], rounds: int) -> dict[Any, list[Turn]]:
    """Each contestant once a round, in an order that turns round every time."""
    turns: dict[Any, list[Turn]] = {name: [] for name in contestants}
    for number in range(1, rounds + 1):
        for name in list(contestants)[:: 1 if number % 2 else -1]:
            turns[name].append(take_turn(contestants[name], number))
            print(f"round {number} of {rounds}: {name} {turns[name][-1].wall:.1f} s", flush=True)
    return turns


def take_turn(run: Callable[[int], Mapping[str, float]], number: int) -> Turn:
    wall, cpu = time.perf_counter(), time.process_time()
    metrics = run(number)
    return Turn(time.perf_counter() - wall, time.process_time() - cpu, metrics)


def settings_of(config: TrainConfig) -> dict[str, Any]:
    """What decides the work of one iteration."""
    return {
        "run_file": f"infra/runs/train_{BASIS}.toml",
        "images": config.batch_size,
        "num_inference_steps": config.num_inference_steps,
        "train_steps_per_sample": config.train_steps_per_sample,
        "guidance_scale": config.guidance_scale,
        "rank": config.rank,
        "threads": THREADS,
    }


def rate(images: int, turns: Sequence[Turn]) -> dict[str, float]:
    return quartiles([images / turn.wall for turn in turns])


def ratios_of(ours: Sequence[Turn], theirs: Sequence[Turn], clock: str) -> dict[str, float]:
    """Quartiles of the rival's time over ours, round by round."""
    return quartiles([getattr(b, clock) / getattr(a, clock) for a, b in zip(ours, theirs, strict=True)])


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else 3 * [values[0]]
    return {"median": round(middle, 4), "p25": round(low, 4), "p75": round(high, 4)}
