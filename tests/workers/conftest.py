"""A service over the tiny model in this process, shared by the tests of the routes and of the engine loop."""

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
