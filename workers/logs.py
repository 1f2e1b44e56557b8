"""Logs as one JSON object a line: what happened, and the facts of it."""

import json
import logging
import sys
import time
from typing import TextIO

AUDIT = "diffusion_blend.audit"


class JsonFormatter(logging.Formatter):
    """time, level, logger and event, then the record's facts; a traceback stays one line."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{record.msecs:03.0f}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
            **getattr(record, "facts", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def log_as_json(stream: TextIO | None = None) -> None:
    """Let this process's own loggers write JSON lines to `stream` (stderr: under Ray, the worker's own log file)."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter())
    for name in ("workers", AUDIT):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(logging.INFO)
        logger.propagate = False


def audit(action: str, **facts: object) -> None:
    """One line for one act of an administrator."""
    logging.getLogger(AUDIT).warning(action, extra={"facts": facts})
