"""Where evaluations lie in object storage: evaluations/<bundle digest>/<evaluation digest>/.

The digest covers the bundle, the run, the rewards and the software, so the same question has one answer and is
never worked out twice. `summary.json` is written last: an evaluation without it is unfinished and is written over.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

from blend.finetune.config import TrainConfig
from infra.errors import ObjectExistsError
from infra.evaluations import bundle_folder
from infra.settings import Settings, read_settings
from infra.storage import Store, open_store
from workers.bundles import open_bundle
from workers.evaluation.config import EvaluateConfig
from workers.evaluation.files import COMMIT
from workers.evaluation.ledger import Ledger
from workers.evaluation.planning import Plan, plan
from workers.evaluation.retraining import train_missing


def settings_for(store_url: str | None) -> Settings:
    """The environment's settings, with another store if one is named."""
    settings = read_settings()
    return settings.model_copy(update={"store_url": store_url}) if store_url else settings


def prepare(config: EvaluateConfig, store_url: str | None = None) -> Plan:
    """Open the run's bundle and check the run against it. Raises EvaluationError or an InfraError."""
    settings = settings_for(store_url)
    bundle = open_bundle(config.bundle, settings)
    tuned_for = {name: adapter.reward for name, adapter in bundle.adapter_records.items()}
    return plan(config, bundle, tuned_for)


def ready(
    planned: Plan,
    store_url: str | None = None,
    on_oracle: Callable[[int, int, TrainConfig], None] = lambda done, total, run: None,
) -> Plan:
    """The plan with all its oracles, those that the registry lacks being trained first."""
    if not planned.oracle_runs:
        return planned
    return planned.with_oracles(train_missing(planned.oracle_runs, settings_for(store_url), store_url, on_oracle))


def open_ledger(planned: Plan, store: Store | None) -> Ledger:
    """What was scored before for this bundle, here and in the store, and where the rest goes. Raises InfraError."""
    bundle = planned.job.bundle.record.digest
    directory = read_settings().cache_dir / "evaluations" / "samples" / bundle
    return Ledger(directory, store, f"{bundle_folder(bundle)}/samples")


def run_directory(planned: Plan) -> Path:
    """Where the files are made unless a directory is named: the same for the same evaluation."""
    return read_settings().cache_dir / "evaluations" / planned.digest


def folder(planned: Plan) -> str:
    """The evaluation's folder in the store."""
    return f"{bundle_folder(planned.job.bundle.record.digest)}/{planned.digest}"


def evaluation_store(store_url: str | None) -> Store:
    """The store that evaluations go to."""
    settings = settings_for(store_url)
    return open_store(settings.store_url, settings)


def headline(directory: Path) -> list[str]:
    """The sentences that sum up a finished evaluation."""
    return list(json.loads((directory / COMMIT).read_text(encoding="utf-8"))["headline"])


def is_complete(planned: Plan, directory: Path) -> bool:
    """Whether the directory holds this very evaluation, finished."""
    try:
        return bool(json.loads((directory / COMMIT).read_text())["facts"]["digest"] == planned.digest)
    except (OSError, ValueError, KeyError):
        return False


def restore(planned: Plan, directory: Path, store: Store) -> bool:
    """Fetch the evaluation if the store has it, and say whether it does."""
    if store.head(f"{folder(planned)}/{COMMIT}") is None:
        return False
    directory.mkdir(parents=True, exist_ok=True)
    for path in store.list(folder(planned)):
        target = directory / PurePosixPath(path).name
        target.unlink(missing_ok=True)
        store.download(path, target)
    return True


def upload(planned: Plan, files: Sequence[Path], store: Store) -> str:
    """Write the files in order, summary.json last; returns the URL of the folder."""
    for file in sorted(files, key=lambda path: path.name == COMMIT):
        path = f"{folder(planned)}/{file.name}"
        try:
            store.upload(path, file)
        except ObjectExistsError:
            _replace_unfinished(planned, path, file, store)
    return f"{store.url.rstrip('/')}/{folder(planned)}"


def _replace_unfinished(planned: Plan, path: str, file: Path, store: Store) -> None:
    """Another attempt left this file (its timings differ); one that was finished stands."""
    if store.head(f"{folder(planned)}/{COMMIT}") is None:
        store.replace(path, file.read_bytes(), store.read_tagged(path)[1])
