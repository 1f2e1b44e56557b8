"""What an image of each size takes, beside a base image in the same round.

In seconds of the processor, on one thread: what else the machine does does not count.
"""

from __future__ import annotations

import time

import numpy as np
import pandas as pd

from blend.engine import BlendEngine, Sample
from blend.metrics import bootstrap_mean
from workers.evaluation.grid import BASE
from workers.evaluation.job import Job
from workers.evaluation.scoring import open_engine
from workers.evaluation.shares import named

ROUNDS = 5
PROMPTS, SEEDS = 1, 4  # of a batch


def seconds_table(job: Job, rounds: int = ROUNDS) -> pd.DataFrame:
    """One row per method and number of rewards: seconds_ratio to the base, whose interval is over rounds.

    Of every size one mix is timed, the plan's first.
    """
    engine = open_engine(job, "cpu")
    engine.model.encode_prompts(["", *job.prompts[:PROMPTS]])
    timed: dict[tuple[str, int], int] = {}
    for place, cell in enumerate(job.cells):
        timed.setdefault((cell.method, len(cell.active)), place)
    batches = {
        key: [job.sample(place, prompt, seed) for prompt in job.prompts[:PROMPTS] for seed in range(SEEDS)]
        for key, place in timed.items()
    }
    _seconds(engine, batches[BASE, 0])
    taken = [{key: _seconds(engine, samples) for key, samples in batches.items()} for _ in range(rounds)]
    return pd.DataFrame(
        {
            "method": method,
            "rewards": count,
            **named(
                "seconds_ratio",
                bootstrap_mean(
                    [one[method, count] / one[BASE, 0] for one in taken],
                    np.random.default_rng(job.config.bootstrap_seed),
                    resamples=job.config.resamples,
                    level=job.config.confidence,
                ),
            ),
        }
        for method, count in batches
        if method != BASE
    )


def _seconds(engine: BlendEngine, samples: list[Sample]) -> float:
    started = time.process_time()
    outputs = engine.run(samples)
    engine.decode([output.latents for output in outputs if output.latents is not None])
    return time.process_time() - started
