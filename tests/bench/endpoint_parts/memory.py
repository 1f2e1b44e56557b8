"""Resident memory of processes over time, and whether it grows."""

import threading
import time
from collections.abc import Mapping
from types import TracebackType

import numpy as np
import psutil


class MemoryWatch:
    """Samples while the context is open."""

    def __init__(self, processes: Mapping[str, psutil.Process], every_s: float = 1.0) -> None:
        self._processes = dict(processes)
        self._every_s = every_s
        self._samples: list[tuple[float, dict[str, float]]] = []
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "MemoryWatch":
        self._thread.start()
        return self

    def __exit__(self, *error: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._end.wait(self._every_s):
            try:
                resident = {name: process.memory_info().rss / 1e6 for name, process in self._processes.items()}
            except psutil.NoSuchProcess:
                return  # a replica that was replaced is another curve
            self._samples.append((time.monotonic(), resident))

    def figures(self) -> dict[str, dict[str, float]]:
        """Megabytes at the end, and the slope over the second half in MB a minute, by process and of all."""
        half = self._samples[len(self._samples) // 2 :]
        if len(half) < 3:
            raise RuntimeError(
                f"{len(self._samples)} samples of memory are too few: a process has ended, or run longer"
            )
        minutes = np.array([at for at, _ in half]) / 60
        curves = {name: np.array([resident[name] for _, resident in half]) for name in self._processes}
        curves["all"] = np.sum(list(curves.values()), axis=0)
        return {
            name: {"mb": round(float(curve[-1]), 1), "mb_per_min": slope(minutes, curve)}
            for name, curve in curves.items()
        }


def slope(x: np.ndarray, y: np.ndarray) -> float:
    """By least squares."""
    return round(float(np.polyfit(x - x.mean(), y, 1)[0]), 3)
