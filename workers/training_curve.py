"""The curve of a run: reward, path KL and the alpha that held it, and what was not trained beside what was."""

from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from blend.finetune.config import TrainConfig
from blend.finetune.held_out import Metrics

ROLLED, HELD, ALPHA = "tab:blue", "tab:orange", "tab:green"


def draw_curve(config: TrainConfig, history: Sequence[Metrics], path: Path) -> None:
    """Write `curve_of` a run as PNG."""
    curve_of(config, history).savefig(path, dpi=110, metadata={"Software": None})


def curve_of(config: TrainConfig, history: Sequence[Metrics]) -> Figure:
    """Panels over the iterations: reward and path KL; alpha where it was controlled; watched rewards and diversity."""
    held = [m for m in history if "held_out_mean" in m]
    panels: list[tuple[float, Callable[[Axes], None]]] = [
        (2.0, lambda axes: _reward(axes, config, history, held)),
        (1.2, lambda axes: _path_kl(axes, config, history, held)),
    ]
    if config.kl_target is not None and any("kl_weight" in m for m in history):
        panels.append((0.9, lambda axes: _alpha(axes, history)))
    if any(m.get("watched") for m in held):
        panels.append((1.2, lambda axes: _watched(axes, config, held)))
    if any(m.get("held_out_diversity") is not None for m in held):
        panels.append((0.9, lambda axes: _diversity(axes, held)))
    shares = [share for share, _ in panels]
    figure = Figure(figsize=(8, 1.6 * sum(shares)), layout="constrained")
    column = figure.subplots(len(panels), 1, sharex=True, height_ratios=shares)
    kept = history[-1].get("kept_iteration")
    for axes, (_, draw) in zip(column, panels, strict=True):
        draw(axes)
        if kept is not None:
            axes.axvline(kept, color="black", linestyle=":", linewidth=1, label="published")
        axes.grid(alpha=0.3)
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0, frameon=False, fontsize="small")
    column[-1].set_xlabel("iteration")
    column[-1].xaxis.get_major_locator().set_params(integer=True)
    return figure


def _reward(axes: Axes, config: TrainConfig, history: Sequence[Metrics], held: Sequence[Metrics]) -> None:
    rolled = [m for m in history if "reward_mean" in m]
    steps = [m["iteration"] for m in rolled]
    low = [m["reward_mean"] - m["reward_ci"] for m in rolled]
    high = [m["reward_mean"] + m["reward_ci"] for m in rolled]
    axes.plot(steps, [m["reward_mean"] for m in rolled], color=ROLLED, label="rollouts")
    axes.fill_between(steps, low, high, color=ROLLED, alpha=0.2, linewidth=0)
    _intervals(
        axes,
        [(m["iteration"], m["held_out_mean"], m["held_out_ci"]) for m in held],
        color=HELD,
        label="held out\n(95 % interval)",
    )
    axes.set_ylabel(config.reward_label)
    goal = f"kl_weight {config.kl_weight:g}"
    goal += f", kl_target {config.kl_target:g} nats" if config.kl_target is not None else ""
    axes.set_title(f"{config.name}: {config.objective}, {goal}")


def _path_kl(axes: Axes, config: TrainConfig, history: Sequence[Metrics], held: Sequence[Metrics]) -> None:
    rolled = [m for m in history if "path_kl" in m]
    axes.plot([m["iteration"] for m in rolled], [m["path_kl"] for m in rolled], color=ROLLED, label="rollouts")
    evaluated = [(m["iteration"], m["held_out_path_kl"]) for m in held]
    axes.plot(*zip(*evaluated, strict=True), "o", color=HELD, label="held out")
    axes.set_ylabel("path KL to\nthe base (nats)")
    if config.guard.kl is not None:
        axes.axhline(config.guard.kl, color="tab:red", linestyle="--", linewidth=1, label="guard.kl")
    if config.kl_target is not None:
        axes.axhline(config.kl_target, color=HELD, linestyle="--", label="kl_target")


def _alpha(axes: Axes, history: Sequence[Metrics]) -> None:
    points = [(m["iteration"], m["kl_weight"]) for m in history if "kl_weight" in m]
    axes.step(*zip(*points, strict=True), where="mid", color=ALPHA, label="in force")
    axes.set_ylim(bottom=0)
    axes.set_ylabel("alpha")


def _watched(axes: Axes, config: TrainConfig, held: Sequence[Metrics]) -> None:
    base = held[0]["watched"]
    for number, (name, measured) in enumerate(base.items()):
        unit = max(measured["std"], 1e-9)
        points = [
            (m["iteration"], (m["watched"][name]["mean"] - measured["mean"]) / unit, m["watched"][name]["ci"] / unit)
            for m in held
        ]
        _intervals(axes, points, color=f"C{number + 4}", label=name)
        if name in config.guard.watch:
            limit = -config.guard.watch[name]
            axes.axhline(limit, color=f"C{number + 4}", linestyle="--", linewidth=1, label=f"guard.watch.{name}")
    axes.set_ylabel("watched, change\nin base std")


def _diversity(axes: Axes, held: Sequence[Metrics]) -> None:
    points = [(m["iteration"], m["held_out_diversity"]) for m in held if m.get("held_out_diversity") is not None]
    axes.plot(*zip(*points, strict=True), "o-", color=HELD, label="held out")
    axes.axhline(points[0][1], color="grey", linestyle="--", linewidth=1, label="base")
    axes.set_ylim(0, 1.15 * max(value for _, value in points) or 1)
    axes.set_ylabel("diversity within\na prompt")


def _intervals(axes: Axes, points: Sequence[tuple[float, float, float]], *, color: str, label: str) -> None:
    steps, means, margins = zip(*points, strict=True)
    axes.errorbar(steps, means, yerr=margins, color=color, marker="o", markersize=4, capsize=3, label=label)
