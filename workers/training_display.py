"""A run in a terminal: a live panel of a few lines, or one plain line per iteration where stderr is no terminal."""

import math
import sys
import threading
import time
from datetime import timedelta
from typing import Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from blend.finetune.config import TrainConfig
from blend.finetune.held_out import Metrics

BAR_WIDTH = 40
REFRESHES_PER_SECOND = 2


class Display(Protocol):
    """Something that shows a run between start and stop."""

    def start(self) -> None: ...

    def show(self, metrics: Metrics) -> None: ...

    def stop(self) -> None: ...


def open_display(config: TrainConfig, wanted: bool = True) -> Display:
    """The panel on a terminal, lines elsewhere, nothing when not wanted.

    Runs in threads get lines too: several at once, as in the demo, would draw their panels over one another.
    """
    if not wanted:
        return Silence()
    console = Console(stderr=True)
    alone = threading.current_thread() is threading.main_thread()
    drawable = alone and console.is_terminal and not console.is_dumb_terminal
    return LivePanel(config, console) if drawable else PlainLines(config)


class Silence:
    """Shows nothing."""

    def start(self) -> None: ...

    def show(self, metrics: Metrics) -> None: ...

    def stop(self) -> None: ...


class PlainLines:
    """One line on stderr for each iteration."""

    def __init__(self, config: TrainConfig) -> None:
        self._clock = Clock()
        self._name = config.name

    def start(self) -> None: ...

    def show(self, metrics: Metrics) -> None:
        self._clock.tick(metrics)
        left = self._clock.left()
        ending = f", {duration(left)} left" if left else ""
        print(f"train {self._name} {progress_line(metrics)}{ending}", file=sys.stderr, flush=True)

    def stop(self) -> None: ...


class LivePanel:
    """A bar with the time left; below it the newest rollouts and the newest held-out evaluation."""

    def __init__(self, config: TrainConfig, console: Console) -> None:
        self._config = config
        self._clock = Clock()
        self._newest: Metrics | None = None
        self._base: Metrics | None = None
        self._held_out: Metrics | None = None
        self._live = Live(
            console=console, get_renderable=self.render, refresh_per_second=REFRESHES_PER_SECOND, transient=False
        )

    def start(self) -> None:
        self._live.start()

    def show(self, metrics: Metrics) -> None:
        self._clock.tick(metrics)
        self._newest = metrics
        if "held_out_mean" in metrics:
            self._held_out = metrics
            if metrics["iteration"] == 0:
                self._base = metrics
        self._live.refresh()

    def stop(self) -> None:
        self._live.stop()

    def render(self) -> Group:
        """The panel as it stands now."""
        done = self._newest["iteration"] if self._newest else 0
        total = self._config.iterations
        left = self._clock.left()
        bar = Table.grid(padding=(0, 1))
        bar.add_row(
            Text(f"train {self._config.name}", style="bold"),
            ProgressBar(total=total, completed=done, width=BAR_WIDTH),
            f"{done}/{total}",
            f"{duration(left)} left" if left else "",
        )
        if self._newest is None:
            return Group(
                bar, Text("  starting: loading the model, then scoring the base on held-out prompts", style="dim")
            )
        rows = Table.grid(padding=(0, 2))
        if rolled := rollout_words(self._newest):
            rows.add_row("  rollouts", ", ".join(rolled))
        if self._held_out is not None:
            at = f"at iteration {self._held_out['iteration']}" if self._held_out["iteration"] else "the base"
            rows.add_row("  held out", ", ".join([*held_out_words(self._held_out, self._base), at]))
        if words := kept_words(self._newest):
            rows.add_row("  stopped" if "stopped" in self._newest else "  kept", words)
        return Group(bar, rows)


class Clock:
    """The time left, from the pace of the iterations that this process has seen."""

    def __init__(self) -> None:
        self._first: tuple[int, float] | None = None
        self._last: tuple[int, float] | None = None
        self._total = 0
        self._seconds = math.nan  # of one iteration, as the trainer measured it, until two were seen

    def tick(self, metrics: Metrics) -> None:
        now = metrics["iteration"], time.monotonic()
        if self._last is None or now[0] <= self._last[0]:
            self._first = now  # the beginning, or workers that were restarted
        self._last = now
        self._total = metrics["iteration"] if "stopped" in metrics else metrics["iterations"]
        self._seconds = metrics.get("seconds", math.nan)

    def left(self) -> float | None:
        """Seconds, or None while nothing is known or nothing is left."""
        if self._first is None or self._last is None or self._last[0] >= self._total:
            return None
        done = self._last[0] - self._first[0]
        pace = (self._last[1] - self._first[1]) / done if done else self._seconds
        if math.isnan(pace):
            return None
        return max(0.0, pace * (self._total - self._last[0]) - (time.monotonic() - self._last[1]))


def duration(seconds: float) -> str:
    """Hours, minutes and seconds."""
    return str(timedelta(seconds=round(seconds)))


def progress_line(metrics: Metrics) -> str:
    """One iteration in words."""
    parts = [f"{metrics['iteration']}/{metrics['iterations']}"]
    if rolled := rollout_words(metrics):
        parts.append(", ".join(rolled))
    if "held_out_mean" in metrics:
        parts.append("held out " + ", ".join(held_out_words(metrics)))
    if words := kept_words(metrics):
        parts.append(f"stopped: {words}" if "stopped" in metrics else words)
    return ": ".join([parts[0], "; ".join(parts[1:])])


def kept_words(metrics: Metrics) -> str | None:
    """Which earlier adapter a run went back to at its end, and why; None when it kept the last."""
    if "kept_iteration" not in metrics:
        return None
    adapter = f"the adapter of iteration {metrics['kept_iteration']} is kept"
    return f"{metrics['stopped']}; {adapter}" if "stopped" in metrics else f"{adapter}: the best within the KL budget"


def rollout_words(metrics: Metrics) -> list[str]:
    """What the rollouts of an iteration gave; nothing for the base."""
    if "reward_mean" not in metrics:
        return []
    words = [f"reward {metrics['reward_mean']:.3f} ± {metrics['reward_ci']:.3f}", f"KL {metrics['path_kl']:.1f} nats"]
    if "kl_weight" in metrics:
        words.append(f"alpha {metrics['kl_weight']:.3g}")
    return [*words, f"{metrics['images_per_second']:.3g} images/s"]


def held_out_words(metrics: Metrics, base: Metrics | None = None) -> list[str]:
    """What a held-out evaluation gave, beside the base's where that is known."""
    reward = f"reward {metrics['held_out_mean']:.3f} ± {metrics['held_out_ci']:.3f}"
    if base is not None and base is not metrics:
        gain = (metrics["held_out_mean"] - base["held_out_mean"]) / max(base["held_out_std"], 1e-9)
        reward += f" ({gain:+.2f} base std)"
    words = [reward]
    if metrics["iteration"]:
        words.append(f"KL {metrics['held_out_path_kl']:.1f} nats")
    if metrics.get("held_out_diversity") is not None:
        known = base is not None and base is not metrics and base.get("held_out_diversity") is not None
        beside = f" (base {base['held_out_diversity']:.3f})" if base is not None and known else ""
        words.append(f"diversity {metrics['held_out_diversity']:.3f}{beside}")
    for name, figures in (metrics.get("watched") or {}).items():
        words.append(f"{name} {figures['mean']:.3f} ± {figures['ci']:.3f}")
    return words
