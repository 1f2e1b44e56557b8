"""A finished evaluation beside the champion's: found in the store, written as `comparison.json` next to its files.

That file is not stored: an evaluation is written once and for good, and what is said here depends on which bundle is
the champion and on what else lies in the store when it is said. infra.comparing tells what is in it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from infra.comparing import changes, compare
from infra.evaluations import Evaluation, earlier_evaluation
from workers.bundles import find_record
from workers.evaluation.files import COMMIT, tell_comparison
from workers.evaluation.planning import Plan
from workers.evaluation.storing import evaluation_store, folder, settings_for

COMPARISON = "comparison.json"


def compare_stored(planned: Plan, directory: Path, store_url: str | None = None) -> dict[str, Any]:
    """Compare the evaluation in `directory` with the champion's in the store, write that there and return it.

    The report in `directory` tells of it as well; the stored one, of what was known when it was stored. Raises
    InfraError.
    """
    summary = json.loads((directory / COMMIT).read_text(encoding="utf-8"))
    bundle = planned.job.bundle.record
    evaluation = Evaluation(planned.digest, folder(planned), summary)
    registry, _ = find_record(bundle.ref, settings_for(store_url))
    earlier = earlier_evaluation(registry, bundle, evaluation, evaluation_store(store_url))
    if earlier is None:
        comparison = compare(summary, None)
    else:
        comparison = compare(summary, earlier.evaluation.summary, earlier.role, changes(earlier.bundle, bundle))
    text = json.dumps(comparison, indent=1, ensure_ascii=False)
    (directory / COMPARISON).write_text(text + "\n", encoding="utf-8")
    tell_comparison(directory, comparison)
    return comparison
