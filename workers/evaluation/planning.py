"""What an evaluation will do, checked against its bundle before the first image."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version

from blend.finetune.config import TrainConfig
from blend.rewards import RewardError, load_reward
from infra.manifests import canonical
from workers.bundles import LoadedBundle
from workers.evaluation.config import EvaluateConfig, EvaluationError
from workers.evaluation.grid import Cell, plan_cells
from workers.evaluation.job import Job, OracleAdapter
from workers.evaluation.retraining import plan_oracles
from workers.evaluation.rivals import rival_of
from workers.evaluation.verdicts import COLUMNS as VERDICTS

# What changes how the work is done, but not its result.
PLACEMENT = {
    *("bundle", "oracle_run", "oracle_settings"),  # their digests do
    *("num_workers", "gpus_per_worker", "reward_actors", "reward_gpus"),
}
# Columns that are there whatever is evaluated.
COLUMNS = {
    *("cell", "method", "kl_lambda", "prompt", "prompt_index", "seed", "diversity", "rows", "path_kl", "seconds"),
    *("decodes", "gradients", "memory_mb", "failed", *VERDICTS),
    *("prompts", "samples", "weighted_gain", "share", "switch_share", "pareto"),
}


@dataclass(frozen=True, slots=True)
class Plan:
    """A checked evaluation: what will be done, and the digest that names its result.

    `oracle_runs` are the trainings behind the oracles' cells; the job has an adapter for those that were done.
    """

    config: EvaluateConfig
    job: Job
    digest: str
    oracle_runs: dict[Cell, TrainConfig] = field(default_factory=dict)

    def with_oracles(self, oracles: Mapping[Cell, OracleAdapter]) -> Plan:
        """The plan with these oracles' adapters."""
        return replace(self, job=replace(self.job, oracles=dict(oracles)))


def plan(config: EvaluateConfig, bundle: LoadedBundle, adapter_rewards: Mapping[str, str]) -> Plan:
    """Resolve and check a run against its bundle; `adapter_rewards` says what each adapter was tuned for.

    Raises EvaluationError naming the key of the run file.
    """
    basis = tuple(bundle.adapters)
    objectives = tuple(adapter_rewards[name] for name in basis)
    names = tuple(dict.fromkeys((*objectives, *config.rewards)))
    defaults = bundle.record.defaults
    config = config.model_copy(
        update={
            "prompts": config.read_prompts(),
            "rewards": names,
            "num_inference_steps": config.num_inference_steps or defaults.num_inference_steps,
            "guidance_scale": defaults.guidance_scale if config.guidance_scale is None else config.guidance_scale,
            "height": config.height or defaults.height,
            "width": config.width or defaults.width,
        }
    )
    if len(config.prompts) * len(config.seeds) < 2:
        raise EvaluationError("prompts: one prompt with one seed says nothing; give more of either", "prompts")
    if "ls" in config.methods and config.eta == 0:
        raise EvaluationError("eta = 0: method ls needs eta > 0; raise eta or leave ls out of methods", "eta")
    _refuse_columns(names)
    versions = {name: _reward_version(name) for name in names}
    cells = _without_gradientless(plan_cells(config, basis), objectives)
    oracle_runs = plan_oracles(config, bundle, cells, objectives)
    identity = {
        "config": config.model_dump(mode="json", exclude=PLACEMENT),
        "bundle": bundle.record.digest,
        "rewards": versions,
        "oracles": sorted(run.name for run in oracle_runs.values()),
        "software": version("diffusion-blend"),
    }
    digest = hashlib.sha256(canonical(identity)).hexdigest()
    scales = _scales(config, bundle, cells)
    job = Job(config, bundle, basis, objectives, scales, tuple(cells), tuple(config.prompts), versions)
    return Plan(config, job, digest, oracle_runs)


def _without_gradientless(cells: Sequence[Cell], objectives: Sequence[str]) -> list[Cell]:
    """Leave out guidance by rewards that have no gradient; EvaluationError where that is all of it."""
    guided = [cell for cell in cells if (rival := rival_of(cell.method)) and rival.needs_gradients]
    flat = {name for name in objectives if not load_reward(name).differentiable}
    lost = {cell for cell in guided if any(objectives[place] in flat for place in cell.active)}
    if guided and len(lost) == len(guided):
        raise EvaluationError(
            f"rivals: {guided[0].method} needs gradients, and {', '.join(sorted(flat))} has none, which every mix here "
            "has a share of: leave it out, or add a mix of other rewards to oracle_weights",
            "rivals",
        )
    return [cell for cell in cells if cell not in lost]


def _scales(config: EvaluateConfig, bundle: LoadedBundle, cells: Sequence[Cell]) -> tuple[tuple[float, float], ...]:
    """Mean and standard deviation of each adapter's reward under the base, as its training measured them."""
    needed = any((rival := rival_of(cell.method)) and rival.searches for cell in cells)
    scales = []
    for name, record in bundle.adapter_records.items():
        measured = [record.metrics.get(key) for key in ("base_reward", "base_std")]
        if needed and (measured[0] is None or measured[1] is None):
            raise EvaluationError(
                f"rivals: the manifest of {record.ref} states no base_reward and base_std, by which best_of, code and "
                f"rgg weigh {name} against the others: leave them out of {', '.join(config.rivals)}, or train it again",
                "rivals",
            )
        scales.append(tuple(one.value if one is not None else float("nan") for one in measured))
    return tuple((mean, sd) for mean, sd in scales)


def _refuse_columns(rewards: Sequence[str]) -> None:
    """A reward is a column of the tables: it may not take the place of another one."""
    for name in rewards:
        if name in COLUMNS or name.startswith("w_") or name.endswith(("_low", "_high", "_gain")):
            raise EvaluationError(
                f"rewards: {name!r} is also a column of the tables: give the plugin another name", "rewards"
            )


def _reward_version(name: str) -> str:
    try:
        return load_reward(name).version
    except (RewardError, OSError) as error:
        raise EvaluationError(f"rewards: {error}", "rewards") from error
