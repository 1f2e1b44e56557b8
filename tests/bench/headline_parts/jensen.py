"""The Jensen gap of the headline's preferences, and what it says about the reward that the blend loses."""

import json
from typing import Any

import pandas as pd
from figures import RESULTS
from headline_parts.retraining import EQUAL, families
from headline_parts.tables import mix

from blend.preference import Preference
from workers.evaluation import EvaluateConfig
from workers.evaluation.gaps import FEWEST, gap_against_loss, gap_png, gap_table
from workers.evaluation.scoring import open_engine
from workers.evaluation.storing import prepare, ready

STEPS_SHOWN = (1, 5, 10, 15, 20)
EARLY = 8  # steps that the rewards of these trainings count in


def measure_jensen(config: EvaluateConfig, prompts: int, seeds: int) -> dict[str, Any]:
    """Relative gap by step for every oracle, along the blend's own path, and its correlation with the loss.

    `by_alpha` has it for the oracles of one preference that were trained at other alphas and ended elsewhere.
    """
    table, labels = _gaps(config, prompts, seeds)
    (RESULTS / "headline_gap.png").write_bytes(gap_png(table))
    found = {label: _figures(table[table["pair"] == place]) for place, label in enumerate(labels)}
    figures = {"prompts": prompts, "seeds": seeds, **found, "predicts": _predicts(found)}
    (basis, _), *others = families(config).items()  # the first is among the oracles above
    figures["by_alpha"] = {basis: found[mix(EQUAL)]}
    figures["by_alpha"] |= {name: _figures(_gaps(one, prompts, seeds)[0]) for name, one in others}
    return {"jensen_gap": figures}


def _gaps(config: EvaluateConfig, prompts: int, seeds: int) -> tuple[pd.DataFrame, list[str]]:
    """The table of gaps, a pair for each oracle, and what the pairs are called."""
    planned = ready(prepare(config))
    job = planned.job
    engine = open_engine(job, "cpu")
    places = [place for place, cell in enumerate(job.cells) if cell in job.oracles]
    pairs = [
        (job.cells[place].preference(job.basis), Preference(weights={job.oracles[job.cells[place]].name: 1.0}))
        for place in places
    ]
    labels = [_label(job.weights(place), job.cells[place].kl_lambda) for place in places]
    return gap_table(engine, job.prompts[:prompts], range(seeds), pairs), labels


def _label(weights: dict[str, float], kl_lambda: float) -> str:
    return mix(weights) if kl_lambda == 1 else f"{mix(weights)} lambda {kl_lambda:g}"


def _figures(rows: pd.DataFrame) -> dict[str, Any]:
    shown = rows[rows["step"].isin(STEPS_SHOWN)]
    return {
        "relative_by_step": {
            str(row["step"]): {end or "mean": row[f"relative_gap{'_' * bool(end)}{end}"] for end in ("", "low", "high")}
            for row in shown.to_dict("records")
        },
        "relative": float(rows["relative_gap"].mean()),
        "relative_early": float(rows.loc[rows["step"] <= EARLY, "relative_gap"].mean()),
        "cosine": float(rows["cosine"].mean()),
        "path_kl": float(rows["path_kl"].iloc[0]),
        "base_path_kl": float(rows["base_path_kl"].iloc[0]),
    }


def _predicts(found: dict[str, dict[str, Any]]) -> dict[str, str]:
    """How the gap goes with the reward lost over the preferences, where the mixes were measured before."""
    path = RESULTS / "headline.json"
    figures = json.loads(path.read_text())["figures"].get("mixes", {}) if path.exists() else {}
    gains = figures.get("weighted_gain", {})
    losses = {
        label: gains["oracle"][label]["mean"] - gains["mpa"][label]["mean"]
        for label in found
        if label in gains.get("oracle", {}) and label in gains.get("mpa", {})
    }
    losses |= {
        label: -row["gap"]["mean"]
        for strength, row in figures.get("kla_gap", {}).items()
        for label in found
        if label.endswith(f" lambda {strength}")
    }
    if len(losses) < FEWEST:
        return {}
    measures = ("path_kl", "relative", "relative_early")
    return {name: str(gap_against_loss({label: found[label][name] for label in losses}, losses)) for name in measures}
