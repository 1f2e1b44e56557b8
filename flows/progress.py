"""Progress artifacts, which never end the work that they tell of."""

from uuid import UUID

from prefect import get_run_logger
from prefect.artifacts import update_progress_artifact


def show_progress(artifact: UUID, percent: float) -> None:
    """Set a progress artifact; where Prefect does not take it, the log says so and the work goes on."""
    try:
        update_progress_artifact(artifact, progress=percent)
    except Exception as error:
        get_run_logger().warning("progress of %.0f %% was not shown: %s: %s", percent, type(error).__name__, error)
