"""Logs as one JSON object a line: what happened, and the facts of it. Never a prompt, never a token."""

import json
import logging
import sys
import time
from logging.handlers import RotatingFileHandler
from pathlib import Path

AUDIT = "diffusion_blend.audit"
MAX_BYTES = 100_000_000
OLD_FILES = 3


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
        return json.dumps(line, default=str)


def log_as_json(path: Path | None = None) -> None:
    """Let this process's own loggers write JSON lines to `path`, of which three old ones are kept.

    Without a path: beside the log file that Serve keeps for this replica, or to stderr where there is none.
    """
    path = path or _beside_serve()
    handler: logging.Handler
    if path is None:
        handler = logging.StreamHandler(sys.stderr)
    else:
        handler = RotatingFileHandler(path, maxBytes=MAX_BYTES, backupCount=OLD_FILES, encoding="utf-8")
    handler.setFormatter(JsonFormatter())
    for name in ("workers", AUDIT):
        logger = logging.getLogger(name)
        for old in logger.handlers:
            old.close()
        logger.handlers[:] = [handler]
        logger.setLevel(logging.INFO)
        logger.propagate = False


def _beside_serve() -> Path | None:
    for handler in logging.getLogger("ray.serve").handlers:
        # Serve writes to its file through a buffer
        file = getattr(handler, "target", handler)
        if isinstance(file, logging.FileHandler):
            return Path(file.baseFilename).with_suffix(".jsonl")
    return None


def audit(action: str, **facts: object) -> None:
    """One line for one act of an administrator."""
    logging.getLogger(AUDIT).warning(action, extra={"facts": facts})
