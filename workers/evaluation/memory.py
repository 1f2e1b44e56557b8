"""The most memory that an item took: of the GPU where it ran on one, of the whole process otherwise."""

from __future__ import annotations

from pathlib import Path

import torch

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
_RESET_PEAK = "5"  # proc(5): sets the peak resident set size to the present one


class PeakMemory:
    """Peak since the last reset, in 10^6 bytes; NaN where the system does not say."""

    def __init__(self, device: torch.device) -> None:
        self._device = device if device.type == "cuda" else None

    def reset(self) -> None:
        """Begin anew."""
        if self._device is not None:
            torch.cuda.reset_peak_memory_stats(self._device)
            return
        try:
            _CLEAR.write_text(_RESET_PEAK)
        except OSError:  # not Linux, or not allowed: the peak is then that of the process's life
            return

    def peak_mb(self) -> float:
        """The peak."""
        if self._device is not None:
            return torch.cuda.max_memory_allocated(self._device) / 1e6
        try:
            line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        except (OSError, StopIteration):
            return float("nan")
        return int(line.split()[1]) * 1024 / 1e6
