"""How many engine replicas there should be: as many as do the work that waits in the time that is wanted."""

import math
from typing import Any

from ray.serve.config import AutoscalingContext

BACKLOG = "backlog_s"


class BacklogPolicy:
    """Asks for one replica per `target_backlog_s` seconds of forecast work; Serve keeps it within min and max."""

    def __init__(self, target_backlog_s: float) -> None:
        self._target_backlog_s = target_backlog_s

    def __call__(self, ctx: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        told = (ctx.aggregated_metrics or {}).get(BACKLOG, {})
        if not told:
            return ctx.target_num_replicas, {}
        return max(1, math.ceil(sum(told.values()) / self._target_backlog_s)), {}


def autoscaling(num_replicas: int, max_replicas: int, target_backlog_s: float) -> dict[str, Any]:
    """Serve's autoscaling_config: up within seconds, down after two quiet minutes."""
    return {
        "min_replicas": num_replicas,
        "initial_replicas": num_replicas,
        "max_replicas": max_replicas,
        "metrics_interval_s": 1.0,
        "look_back_period_s": 5.0,
        "upscale_delay_s": 3.0,
        "downscale_delay_s": 120.0,
        "policy": {
            "policy_function": "workers.autoscaling:BacklogPolicy",
            "policy_kwargs": {"target_backlog_s": target_backlog_s},
        },
    }
