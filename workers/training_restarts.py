"""Restarts of worker groups: who counts them, and a start of workers that costs less.

Ray's controller imports this module, so that it must not lead to the model's code.
"""

import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import ray
from ray import cloudpickle
from ray.actor import ActorHandle
from ray.train import UserCallback

from blend.finetune.errors import FinetuneError


class Crashes(UserCallback):
    """Counts the crashes of worker groups, in Ray's controller; raising there ends the run instead of restarting it."""

    def __init__(self, board: ActorHandle) -> None:
        self._board = board

    def after_exception(self, run_context: object, worker_exceptions: dict[int, Exception]) -> None:
        lines = [f"rank {rank}: {_last_line(error)}" for rank, error in worker_exceptions.items()]
        if ray.get(self._board.crash.remote("; ".join(lines))):
            raise FinetuneError("no further restart")


def _last_line(error: Exception) -> str:
    """What an error says, without the worker's traceback before it."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def start_lean(function: Callable[..., None], *parts: Any, **more: Any) -> Callable[[], None]:
    """`function(*parts, **more)` for another process, which imports what `parts` need without collecting garbage.

    Those imports make nothing but lasting objects; looking through them again and again is a quarter of their time.
    """
    return partial(_run, cloudpickle.dumps((function, parts)), more)


def _run(packed: bytes, more: dict[str, Any]) -> None:
    gc.disable()
    try:
        function, parts = cloudpickle.loads(packed)
        gc.freeze()
    finally:
        gc.enable()
    function(*parts, **more)
