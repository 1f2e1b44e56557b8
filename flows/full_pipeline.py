"""Flow: fine-tune a basis in parallel, register it as a bundle, evaluate, deploy, and ask it for one image."""

import base64
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_table_artifact
from prefect.task_runners import ThreadPoolTaskRunner

from blend.finetune.config import TrainConfig
from flows.deploy_blend import deploy_blend
from flows.evaluate_blend import evaluate_blend
from flows.events import REGISTERED, emit, registration
from flows.train_basis import train_basis
from infra.manifests import AdapterRecord
from infra.settings import read_settings
from workers.cluster import ray_session
from workers.training import TrainJob

REWARDS = ("colourfulness", "compressibility")


@flow(name="full-pipeline", task_runner=ThreadPoolTaskRunner(max_workers=16))
def full_pipeline(
    base_model: str = "sprites",
    rewards: tuple[str, ...] = REWARDS,
    prompts: tuple[str, ...] | str = "sprites-train",
    held_out_prompts: tuple[str, ...] | str = "sprites-test",
    bundle: str = "pipeline",
    training: dict[str, Any] | None = None,
    evaluation: dict[str, Any] | None = None,
    prompt: str = "A red colored car.",
    port: int = 8000,
    store_url: str | None = None,
    output_dir: str | None = None,
) -> dict[str, Any]:
    """One adapter of `base_model` per reward; `training` and `evaluation` hold further keys of their run files.

    Without RAY_ADDRESS the endpoint lives on a private Ray and ends with this flow. output_dir keeps what the run
    writes (default: the cache, in directories that a second run of the same settings resumes).
    """
    shared = {"base_model": base_model, "prompts": prompts, "held_out_prompts": held_out_prompts}
    runs = plan_training(rewards, shared | (training or {}))
    with ray_session():
        futures = [fine_tune.submit(run, store_url, inside(output_dir, run.name)) for run in runs]
        adapters = [future.result() for future in futures]
        ref = register_bundle(bundle, adapters, runs[0], store_url)
        grid = {"prompts": held_out_prompts, **(evaluation or {}), "bundle": ref}
        report = evaluate_blend(grid, store_url=store_url, output_dir=inside(output_dir, "evaluation"))
        promote_bundle(ref, store_url)
        url = deploy_blend(bundle=ref, store_url=store_url, port=port)
        image = request_image(url, prompt, rewards, inside(output_dir, "image.png"))
    report_gains(adapters)
    return {
        "bundle": ref,
        "adapters": [record.model_dump(mode="json") for record in adapters],
        "evaluation": report,
        "url": url,
        "image": image,
    }


def inside(directory: str | None, name: str) -> str | None:
    return None if directory is None else str(Path(directory) / name)


@task
def plan_training(rewards: tuple[str, ...], settings: dict[str, Any]) -> list[TrainConfig]:
    """One run per reward, all checked before the first begins."""
    runs = [TrainConfig.parse({"name": reward, "reward": reward} | settings, source="training") for reward in rewards]
    for run in runs:
        TrainJob.prepare(run)
    return runs


@task(task_run_name="fine-tune-{run.name}")
def fine_tune(run: TrainConfig, store_url: str | None, output_dir: str | None) -> AdapterRecord:
    """The train-basis flow as a task, so that several run at once on one cluster."""
    return AdapterRecord.model_validate(train_basis(run.model_dump(mode="json"), store_url, output_dir))


@task(retries=3, retry_delay_seconds=[2, 10, 30])
def register_bundle(name: str, adapters: list[AdapterRecord], run: TrainConfig, store_url: str | None) -> str:
    """Publish the basis, named after its rewards; the same adapters again are the version that is there."""
    from workers.basis import join_basis
    from workers.publishing import open_registry

    record = join_basis(name, {record.reward: record for record in adapters}, run, store_url)
    emit(REGISTERED, record.ref, registration(record, open_registry(store_url).store.url))
    get_run_logger().info("published bundle %s", record.ref)
    return record.ref


@task(retries=3, retry_delay_seconds=[2, 10, 30])
def promote_bundle(ref: str, store_url: str | None) -> None:
    """Make the evaluated bundle the champion of its name, unless the champion was evaluated as better."""
    from workers.basis import promote

    found = promote(ref, "trained and evaluated by full-pipeline", store_url)
    if not found.promoted:
        get_run_logger().warning("%s does not become the champion: %s", ref, found.reason)


@task(retries=2, retry_delay_seconds=2)
def request_image(url: str, prompt: str, rewards: tuple[str, ...], path: str | None) -> str:
    """One image at equal weights over HTTP, written as PNG; returns its path."""
    from workers.api import GenerationRequest
    from workers.client import request_images

    target = Path(path) if path else read_settings().cache_dir / "pipeline" / "image.png"
    weights = {reward: 1 / len(rewards) for reward in rewards}
    answer = request_images(url, GenerationRequest(prompt=prompt, weights=weights, seed=0))
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(base64.b64decode(answer.data[0].b64_json))
    return str(target.absolute())


@task
def report_gains(adapters: list[AdapterRecord]) -> None:
    """Held-out reward before and after, per adapter."""
    from workers.basis import gain_table

    create_table_artifact(table=gain_table(adapters), key="full-pipeline-gains", description="Reward before and after")
