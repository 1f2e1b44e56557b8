"""The Ray cluster a job runs on: the one in use, the one RAY_ADDRESS names, or a private one for the job."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import ray

# Ray reads these when it starts; a value set by the user wins.
RAY_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # the default of 2 seconds paces every report of a training loop
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_V2_ENABLED": "1",
    # a process per group of workers that tells them of nodes about to go: they keep a checkpoint per iteration anyway
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # on a busy machine the imports of a worker alone can take longer than the default of 60 seconds
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",
    # and the endpoint's proxy longer than the default of 5 seconds, after which Serve gives it up
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "60",
    # two contended OpenMP threads are far slower than one
    "OMP_NUM_THREADS": "1",
}


@contextmanager
def ray_session(
    num_cpus: int | None = None, num_gpus: int | None = None, metrics_port: int | None = None
) -> Iterator[str]:
    """Yield the address of a connected cluster; at the end leave or stop only what was started here.

    num_cpus and num_gpus size a private cluster (None: all there is); metrics_port is that of its Prometheus page
    (None: a free one). Nested sessions share one cluster.
    """
    for name, value in RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if ray.is_initialized():
        yield ray.get_runtime_context().gcs_address
        return
    # Ray's token authentication is on by default and says so, as a warning, each time it starts.
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    if address := os.environ.get("RAY_ADDRESS"):
        ray.init(address=address, logging_level=logging.WARNING, log_to_driver=False)
    else:
        ray.init(
            address="local",
            num_cpus=num_cpus,
            num_gpus=num_gpus,
            include_dashboard=False,
            _metrics_export_port=metrics_port,
            logging_level=logging.WARNING,
            # workers report through actors and exceptions; what they print stays in Ray's session directory
            log_to_driver=False,
        )
    try:
        yield ray.get_runtime_context().gcs_address
    finally:
        ray.shutdown()
