"""What a run in progress leaves behind: its metrics file, its TensorBoard events, and words about each iteration."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from blend.finetune.config import TrainConfig
from blend.finetune.held_out import Metrics
from workers.tensorboard import EventLog
from workers.training_display import open_display

TENSORBOARD = "tensorboard"
CURVES = {
    "reward_mean": "reward/rollouts",
    "held_out_mean": "reward/held_out",
    "path_kl": "path_kl/rollouts",
    "held_out_path_kl": "path_kl/held_out",
    "kl_weight": "path_kl/alpha",
    "held_out_diversity": "diversity/held_out",
    "images_per_second": "speed/images_per_second",
    "seconds": "speed/seconds",
    "policy_loss": "update/policy_loss",
    "value_loss": "update/value_loss",
    "grad_norm": "update/grad_norm",
    "ratio_deviation": "update/ratio_deviation",
    "clipped": "update/clipped",
}


class ProgressLog:
    """Shows each iteration as it arrives: a line of JSON, TensorBoard events, the terminal, the caller's callback.

    A resumed run, or one whose workers were restarted, repeats iterations: the newer ones take the place of the older.
    """

    def __init__(
        self, config: TrainConfig, path: Path, on_progress: Callable[[Metrics], None] | None, show_bar: bool
    ) -> None:
        self._file = MetricsFile(path)
        self._events = EventLog(path.parent / TENSORBOARD)
        self._on_progress = on_progress
        self._display = open_display(config, show_bar)

    def __enter__(self) -> "ProgressLog":
        self._display.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._display.stop()
        self._events.close()

    def __call__(self, metrics: Metrics) -> None:
        self._file.write(metrics)
        self._events.scalars(metrics["iteration"], scalars_of(metrics))
        self._display.show(metrics)
        if self._on_progress is not None:
            self._on_progress(metrics)


class MetricsFile:
    """metrics.jsonl while a run goes on: a line per iteration, in order, each iteration once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._last: int | None = None  # newest iteration in a file known to be whole

    def write(self, metrics: Metrics) -> None:
        """Append; an iteration that is already there, and all after it, are replaced."""
        if self._last is not None and metrics["iteration"] > self._last:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(metrics) + "\n")
        else:
            earlier = [line for line in read_metrics(self._path) if line["iteration"] < metrics["iteration"]]
            write_metrics([*earlier, metrics], self._path)
        self._last = metrics["iteration"]


def read_metrics(path: Path) -> list[Metrics]:
    """The lines of a metrics file; a last one that an interruption cut short is left out, no file is no lines."""
    lines: list[Metrics] = []
    if not path.exists():
        return lines
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            metrics = json.loads(line)
        except ValueError:
            continue
        if isinstance(metrics, dict) and "iteration" in metrics:
            lines.append(metrics)
    return lines


def write_metrics(history: Sequence[Metrics], path: Path) -> None:
    """Write the file beside and rename it: a reader never sees half of it."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text("".join(json.dumps(metrics) + "\n" for metrics in history), encoding="utf-8")
    os.replace(partial, path)


def scalars_of(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The curves of one line by TensorBoard tag; watched rewards as watched/NAME."""
    scalars = {tag: metrics[key] for key, tag in CURVES.items() if metrics.get(key) is not None}
    watched = metrics.get("watched") or {}
    return scalars | {f"watched/{name}": figures["mean"] for name, figures in watched.items()}
