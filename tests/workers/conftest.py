"""What the tests of this room share: a service over the tiny model in this process, and one Ray cluster."""

import pytest


@pytest.fixture(scope="session")
def engine_args(tiny_sd_dir, tiny_adapters):
    from workers.engine_args import EngineArgs

    return EngineArgs(base=str(tiny_sd_dir), adapters=tiny_adapters)


@pytest.fixture(scope="session")
def opened(engine_args):
    from workers.loading import open_engine

    return open_engine(engine_args)


@pytest.fixture(scope="session")
def service(opened):
    from workers.service import GenerationService

    service = GenerationService(opened, max_queued_rows=500)
    service.warm_up()
    yield service
    service.close()


@pytest.fixture(scope="session")
def client(service):
    from fastapi.testclient import TestClient

    from workers.routes import create_http

    with TestClient(create_http(service)) as client:
        yield client


@pytest.fixture(scope="session")
def cluster(tiny_store_url):
    """A Ray cluster of two CPUs; whatever asks for one of its own while this is up gets this one.

    tiny_store_url sets the cache's place, which Ray's processes take over when they start.
    """
    from workers.cluster import ray_session

    with ray_session(num_cpus=2, num_gpus=0) as address:
        yield address
