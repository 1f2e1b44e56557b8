"""Oracles: a model retrained for one preference, or at one KL strength, as what the blend stands in for.

An oracle is an adapter like any other, tuned by the trainer of the basis with its settings, toward
sum_i w_i (r_i - mean_i) / std_i at the same alpha. At another strength it is tuned toward one reward at alpha / lambda
and, since a training that ends before alpha decides how far it goes is as strong at any alpha, within a path KL of
lambda^2 times the adapter's: that of two Gaussians whose means differ by lambda as much. The registry keeps it under a
name that says by its digest how it was trained, so that it is trained once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from blend.finetune.config import TrainConfig
from blend.finetune.errors import ConfigError
from infra.errors import UnknownRecordError
from infra.manifests import AdapterRecord
from infra.settings import Settings
from workers.bundles import LoadedBundle, find_record, local_cache
from workers.evaluation.config import EvaluateConfig, EvaluationError
from workers.evaluation.grid import ORACLE, Cell
from workers.evaluation.job import OracleAdapter

DIGITS = 6  # of a weight in a training: thirds are no binary fractions


def plan_oracles(
    config: EvaluateConfig, bundle: LoadedBundle, cells: Sequence[Cell], objectives: Sequence[str]
) -> dict[Cell, TrainConfig]:
    """The training behind each oracle cell. EvaluationError names the key of the run file at fault."""
    asked = [cell for cell in cells if cell.method == ORACLE]
    if not asked:
        return {}
    template = _template(config)
    try:
        return {cell: _training(template, bundle, cell, objectives) for cell in asked}
    except ConfigError as error:
        raise EvaluationError(f"oracle_run: {error}", "oracle_run") from error


def _template(config: EvaluateConfig) -> TrainConfig:
    """What every oracle is trained by, but for what its preference decides."""
    if config.oracle_run is None:
        raise EvaluationError("oracle_run: oracles need the run file that they are trained by", "oracle_run")
    try:
        run = TrainConfig.from_toml(config.oracle_run)
    except ConfigError as error:
        raise EvaluationError(f"oracle_run: {error}", "oracle_run") from error
    try:
        return TrainConfig.parse(run.model_dump() | config.oracle_settings, source="oracle_settings")
    except ConfigError as error:
        raise EvaluationError(str(error), "oracle_settings") from error


def _training(template: TrainConfig, bundle: LoadedBundle, cell: Cell, objectives: Sequence[str]) -> TrainConfig:
    shares: dict[str, float] = {}
    for place in cell.active:
        shares[objectives[place]] = round(shares.get(objectives[place], 0.0) + cell.weights[place], DIGITS)
    reward = next(iter(shares)) if len(shares) == 1 else shares
    settings = template.model_dump() | {
        "name": ORACLE,
        "base_model": bundle.record.base.source,
        "reward": reward,
        "kl_weight": round(template.kl_weight / cell.kl_lambda, 9),
    }
    if cell.kl_lambda != 1 and template.kl_target is not None:
        tuned = list(bundle.adapter_records.values())[cell.active[0]].metrics.get("path_kl")
        reach = template.kl_target if tuned is None else tuned.value
        settings["kl_target"] = round(cell.kl_lambda**2 * reach, 3)
    training = TrainConfig.parse(settings, source="oracle")
    return training.model_copy(update={"name": f"{ORACLE}-{training.digest}"})


def find_oracles(runs: Mapping[Cell, TrainConfig], settings: Settings) -> dict[Cell, OracleAdapter]:
    """The oracles that the registry has, with their files here. Raises InfraError."""
    found = {}
    for cell, run in runs.items():
        try:
            registry, record = find_record(f"{run.name}@1", settings, "adapter")
        except UnknownRecordError:
            continue
        assert isinstance(record, AdapterRecord)
        [path] = local_cache(settings).adapters(registry.store, [record])
        found[cell] = OracleAdapter(run.name, path, record.content_sha256)
    return found


def train_oracle(run: TrainConfig, store_url: str | None = None) -> AdapterRecord:
    """Train and publish one oracle; one that was interrupted goes on. Raises FinetuneError or an InfraError."""
    # Ray Train, which an evaluation without oracles does without
    from workers.publishing import check_store, publish_fit, run_directory
    from workers.training import fit_basis

    check_store(store_url)
    return publish_fit(run, fit_basis(run, output_dir=run_directory(run)), store_url)


def train_missing(
    runs: Mapping[Cell, TrainConfig],
    settings: Settings,
    store_url: str | None = None,
    on_oracle: Callable[[int, int, TrainConfig], None] = lambda done, total, run: None,
) -> dict[Cell, OracleAdapter]:
    """All oracles, after those that the registry lacks were trained; `on_oracle` hears of each before it starts."""
    known = find_oracles(runs, settings)
    missing = [run for cell, run in runs.items() if cell not in known]
    for place, run in enumerate(missing):
        on_oracle(place, len(missing), run)
        train_oracle(run, store_url)
    return find_oracles(runs, settings) if missing else known
