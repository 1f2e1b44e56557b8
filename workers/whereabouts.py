"""Where the Ray cluster in use tells what it does: a Prometheus page on every machine, and log files."""

from pathlib import Path
from typing import Any

import ray


def metrics_pages() -> list[str]:
    """URLs of the Prometheus pages, one per machine; none where Ray's metrics are switched off."""
    return [
        f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        for node in _machines()
        if node["MetricsExportPort"] > 0
    ]


def log_files() -> str:
    """The endpoint's log files on any machine of this cluster, as a pattern for a shell."""
    # the one path below Ray's session directory that its public interface tells
    session = Path(_machines()[0]["ObjectStoreSocketName"]).parents[1]
    return str(session / "logs" / "serve" / "*.jsonl*")


def _machines() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]
