"""What the tests of this room share: a service over the tiny model in this process, and one Ray cluster."""

import os

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

    service = GenerationService(opened, max_queue_s=10.0)
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
def plugin_site(tmp_path_factory):
    """A directory with an installed reward plugin, `symmetry`, on the path of Ray's workers alone."""
    from plugin_packages import put_example

    directory = tmp_path_factory.mktemp("site")
    put_example(directory)
    return directory


@pytest.fixture(scope="session")
def cluster(tiny_store_url, plugin_site):
    """A Ray cluster of two CPUs; whatever asks for one of its own while this is up gets this one.

    tiny_store_url sets the cache's place, which Ray's processes take over when they start.
    """
    from workers.cluster import ray_session

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(plugin_site), prepend=os.pathsep)
        # figures reach the metrics page ten times sooner than by default
        patch.setenv("RAY_metrics_report_interval_ms", "1000")
        with ray_session(num_cpus=2, num_gpus=0) as address:
            yield address


@pytest.fixture(scope="module")
def job(tiny_sd_dir):
    """A training job of seconds on a tiny model."""
    from blend.finetune.config import TrainConfig
    from workers.training import TrainJob

    settings = {
        "name": "stored",
        "reward": "colourfulness",
        "base_model": str(tiny_sd_dir),
        "prompts": ("A red colored car.", "A blue colored cup."),
        "held_out_prompts": ("A red colored cup.",),
        "held_out_images": 2,
        "rank": 2,
        "iterations": 6,
        "prompts_per_iteration": 2,
        "images_per_prompt": 2,
        "num_inference_steps": 2,
        "train_steps_per_sample": 1,
        "num_workers": 0,
    }
    return TrainJob.prepare(TrainConfig.parse(settings))


@pytest.fixture(scope="module")
def trainer(job):
    """One whose base was evaluated; tests set its iteration and save it."""
    trainer = job.trainer()
    trainer.history.append({"iteration": 0, **trainer.evaluate()})
    return trainer


@pytest.fixture
def save(trainer):
    def at(checkpoints, iteration):
        trainer.iteration = iteration
        return checkpoints.save(trainer)

    return at


@pytest.fixture
def impatient(monkeypatch):
    """Stores are given up after a third of a second."""
    from workers import checkpoints as places

    monkeypatch.setattr(places, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(places, "LONGEST_PAUSE_S", 0.05)
    monkeypatch.setattr(places, "DEADLINE_S", 0.3)
