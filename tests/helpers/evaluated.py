"""Analyses of samples that were made up: what an evaluation with oracles, rivals and a judge finds, in a second."""

import numpy as np
import pandas as pd

from workers.evaluation.analysis import analyse
from workers.evaluation.config import EvaluateConfig
from workers.evaluation.grid import plan_cells
from workers.evaluation.report import Facts

BASIS = ("brightness", "colourfulness", "compressibility")
# gain of each adapter alone in each reward, in base standard deviations
EFFECTS = np.array([[2.2, -0.5, 0.6], [-0.4, 2.4, -0.6], [-0.6, -0.2, 1.8]])
PROMPTS = tuple(f"A {colour} coloured {thing}." for colour in ("red", "blue", "green") for thing in ("cup", "cat"))
# share of the linear blend's gain that a method gains, and its UNet rows over those of the base
METHODS = {
    "oracle": (1.2, 1),
    "mpa": (1.1, 2.4),
    "staged": (1.08, 1),
    "ls": (1.02, 1),
    "soup": (0.9, 1),
    "cached": (1.05, 1.3),
    "best_of_4": (0.45, 4),
    "code_4_5": (0.7, 3.8),
    "rgg_2": (0.8, 3),
    "switch": (0.75, 1),
    "composite": (0.85, 3),
}
# what the made-up comparison compares
FRONTS = ("adapters alone", "mpa", "mpa, any lambda", "soup")
COSTS = {"rows": {"then": 80.0, "now": 80.0}, "seconds": {"then": 0.5, "now": 0.5}}
PLAIN = EvaluateConfig(
    bundle="sprites@3",
    prompts=PROMPTS,
    seeds=(0, 1, 2),
    resamples=200,
    kl_lambdas=(0.5, 1.0, 1.5),
    methods=("mpa", "staged", "ls", "soup"),
)
WITH_ORACLES = PLAIN.model_copy(
    update={
        "methods": ("mpa", "staged", "ls", "soup", "cached"),
        "rivals": ("best_of_4", "code_4_5", "rgg_2", "switch", "composite"),
        "oracle_weights": (
            {"brightness": 0.5, "colourfulness": 0.5},
            {"colourfulness": 0.5, "compressibility": 0.5},
            dict.fromkeys(BASIS, 1 / 3),
        ),
        "oracle_lambdas": {"colourfulness": (0.5, 1.5)},
        "path_kl": True,
        "judge": True,
    }
)


def analysed(config=PLAIN, *, noise=0.25, effects=EFFECTS):
    """An analysis whose methods differ as METHODS says."""
    cells = plan_cells(config, BASIS)
    return analyse(samples(cells, config, noise, effects), cells, BASIS, BASIS, BASIS, config)


def samples(cells, config, noise, effects):
    """The frame of samples, with the columns that the config asks for."""
    generator = np.random.default_rng(0)
    count = len(config.prompts), len(config.seeds), len(BASIS)
    difficulty = generator.normal(0, 1, size=count)
    rows = []
    for index, cell in enumerate(cells):
        part, cost = METHODS.get(cell.method, (1.0, 1))
        gain = part * (1 - np.exp(-1.5 * cell.kl_lambda)) / (1 - np.exp(-1.5)) * (np.asarray(cell.weights) @ effects)
        values = difficulty + gain + generator.normal(0, noise, size=count)
        kl = 0.02 * cell.kl_lambda**2 * (1 + 0.3 * (1.2 - part)) if config.path_kl else np.nan
        for prompt in range(count[0]):
            for place, seed in enumerate(config.seeds):
                row = {"cell": index, "prompt_index": prompt, "seed": seed, "rows": 40.0 * cost, "seconds": 0.2 * cost}
                row |= {"diversity": 0.2, "path_kl": kl, "gradients": 20.0 if cell.method == "rgg_2" else 0.0}
                row |= {"decodes": 4.0 if "_4" in cell.method else 1.0, "memory_mb": 200.0 + 80 * cost}
                if config.judge:
                    row |= {name: float(generator.random() < 0.8) for name in ("colour_right", "object_right")}
                    row["binding_right"] = row["colour_right"] * row["object_right"]
                rows.append(row | dict(zip(BASIS, values[prompt, place], strict=True)))
    return pd.DataFrame(rows)


def facts(analysis, config=PLAIN):
    """What such an evaluation states about itself."""
    return Facts(
        bundle="sprites@3",
        bundle_digest="b" * 64,
        digest="e" * 64,
        base="sprites (hash 0123456789ab)",
        adapters={name: name for name in analysis.basis},
        rewards=dict.fromkeys(analysis.rewards, "1"),
        prompts=tuple(config.prompts),
        seeds=tuple(config.seeds),
        steps=20,
        guidance=3.0,
        eta=1.0,
        cells=len(analysis.summary),
        samples=int(analysis.summary["samples"].sum()),
        date="2026-11-28 14:01 UTC",
        machine="one worker on a CPU (2 cores, x86_64)",
        batch_size=16,
        resamples=config.resamples,
        confidence=config.confidence,
        path_kl=config.path_kl,
    )


def comparison(verdict, factor=1.1):
    """Beside an earlier evaluation whose figures the new ones exceed by that factor."""

    def line(value, spread=0.02):
        def around(mean):
            return {"mean": mean, "low": mean * (1 - spread), "high": mean * (1 + spread)}

        apart = abs(factor - 1) > spread
        word = ("better" if factor > 1 else "worse") if apart else "no clear difference"
        return {"then": around(value), "now": around(value * factor), "change": value * (factor - 1), "verdict": word}

    identity = {"bundle_digest": "c" * 64, "digest": "d" * 64, "date": "2026-11-20 09:30 UTC"}
    if verdict == "not compared":
        parts = {"against": None, "fronts": [], "methods": [], "cells": []}
    else:
        parts = {
            "against": {"bundle": "sprites@2", "role": "the champion", **identity},
            "fronts": [
                {"front": front, **line(30.0)} for front in ("adapters alone", "mpa", "mpa, any lambda", "soup")
            ],
            "methods": [
                {
                    "method": method,
                    **line(0.6),
                    "rows": {"then": 80.0, "now": 80.0},
                    "seconds": {"then": 0.5, "now": 0.5},
                }
                for method in ("mpa", "soup")
            ],
            "cells": [],
        }
    return {
        "schema_version": 1,
        "verdict": verdict,
        "sentences": ["Compared with sprites@2, the champion."],
        "now": {"bundle": "sprites@3", **identity},
        **parts,
    }
