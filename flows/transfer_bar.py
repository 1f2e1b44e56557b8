"""The bar of commands that move files: bytes, rate and time left, on stderr."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def transfer_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """To be told (bytes moved since the last call, bytes in all), from any thread; nothing to move, no bar."""
    lock = threading.Lock()
    bars: list[Any] = []

    def moved(more: int, total: int) -> None:
        from tqdm import tqdm

        with lock:
            if not bars:
                bars.append(tqdm(total=total, desc=what, unit="B", unit_scale=True, unit_divisor=1024, leave=False))
            bars[0].update(more)

    try:
        yield moved
    finally:
        for bar in bars:
            bar.close()
