"""Replicas that come and go: one is added while work piles up, and one whose engine has ended is replaced."""

import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from endpoints import ROUTE
from waiting import wait_for

BASE = {"prompt": "a red car", "weights": {"warm": 1.0}, "num_inference_steps": 2, "seed": 1}

pytestmark = [pytest.mark.slow, pytest.mark.long]


@pytest.fixture(scope="module")
def breakable(cluster, tiny_sd_dir, tiny_adapters):
    """The endpoint with one replica or two, and an engine that can be ended from outside: (url, handle)."""
    from ray import serve

    from workers.autoscaling import autoscaling
    from workers.deploying import ENGINE, address, check_port
    from workers.engine_args import ServeArgs
    from workers.serving import EngineReplica, Ingress

    class Breakable(EngineReplica.func_or_class):
        async def end_engine(self) -> None:
            self._host.service.loop._orders.put(None)  # what the thread cannot unpack

    args = ServeArgs(base=str(tiny_sd_dir), adapters=tiny_adapters, max_queue_s=6000.0)
    engine = EngineReplica.options(
        func_or_class=Breakable,
        user_config={"bundle": None},
        health_check_period_s=0.5,
        ray_actor_options={"num_cpus": 1},
        num_replicas=None,
        autoscaling_config=autoscaling(1, 2, target_backlog_s=1.0),
    )
    serve.start(http_options={"host": "127.0.0.1", "port": check_port("127.0.0.1", 0)})
    serve.run(Ingress.bind(engine.bind(args), args), name="breakable")
    yield address(), serve.get_deployment_handle(ENGINE, "breakable")
    serve.delete("breakable")
    serve.shutdown()


def pids(engine) -> set[int]:
    return {figures["pid"] for figures in engine.broadcast("figures").results()}


def test_a_replica_whose_engine_thread_has_ended_is_replaced(breakable):
    url, engine = breakable
    before = httpx.post(url + ROUTE, json=BASE, timeout=60).json()
    [pid] = pids(engine)
    engine.end_engine.remote().result()
    wait_for(lambda: engine.figures.remote().result()["pid"] != pid)
    wait_for(lambda: httpx.get(f"{url}/readyz", timeout=60).status_code == 200)
    assert httpx.post(url + ROUTE, json=BASE, timeout=60).json()["data"] == before["data"]


def test_work_that_piles_up_brings_a_second_replica(breakable):
    url, engine = breakable
    long = {**BASE, "num_inference_steps": 200, "n": 8, "stream": True}
    enough = threading.Event()

    def occupy() -> int:
        with httpx.stream("POST", url + ROUTE, json=long, timeout=300) as reply:
            enough.wait()
            return reply.status_code

    with ThreadPoolExecutor(8) as pool:
        occupying = [pool.submit(occupy) for _ in range(8)]
        try:
            wait_for(lambda: len(pids(engine)) == 2)
        finally:
            enough.set()
        assert {one.result() for one in occupying} == {200}
