"""Event files that TensorBoard reads, written as they come: no queue, no thread, nothing lost with the process.

Format: TFRecord frames around Event messages (tensorboardX brings both). TensorBoard reads the files of a directory in
the order of their names; a SessionLog START drops what it had at or after that step.
"""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from tensorboardX.event_file_writer import EventsWriter

SHEETS_SUFFIX = ".sheets"


class EventLog:
    """The scalars of one run. A file appears with the first event; an iteration that comes again purges the older."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._writer: EventsWriter | None = None
        self._last: int | None = None

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write one step, and have it on disk on return."""
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.summary import scalar

        if self._writer is None:
            resumed = any(self._directory.glob("*tfevents*"))
            self._writer = open_writer(self._directory, f".{os.getpid()}")
        else:
            resumed = self._last is not None and step <= self._last
        if resumed:
            start = SessionLog(status=SessionLog.START)
            self._writer.write_event(Event(wall_time=time.time(), step=step, session_log=start))
        for tag, value in values.items():
            self._writer.write_event(Event(wall_time=time.time(), step=step, summary=scalar(tag, value)))
        self._writer.flush()
        self._last = step

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def write_sheets(directory: Path, rows: Mapping[int, Tensor]) -> None:
    """The sample sheet's rows, {iteration: uint8 [3, H, W]}, as images of one tag; an earlier set is replaced."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.summary import image

    for old in directory.glob(f"*tfevents*{SHEETS_SUFFIX}"):
        old.unlink()
    writer = open_writer(directory, SHEETS_SUFFIX)
    for step, pixels in rows.items():
        summary = image("held_out/samples", pixels.numpy())
        writer.write_event(Event(wall_time=time.time(), step=step, summary=summary))
    writer.close()


def open_writer(directory: Path, suffix: str) -> "EventsWriter":
    """A new event file, named so that it sorts after those that are there."""
    from tensorboardX.event_file_writer import EventsWriter

    directory.mkdir(parents=True, exist_ok=True)
    return EventsWriter(str(directory / "events"), f".{time.time_ns()}{suffix}")
