"""Runs that are killed, interrupted or refused: what was kept is whole, and going on gives the same adapter."""

import importlib.util
import multiprocessing
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import ray
from waiting import wait_for

from blend.finetune.checkpoint import iteration_of
from blend.finetune.config import TrainConfig
from blend.finetune.errors import CheckpointError, ConfigError, FinetuneError, ResumeError
from workers import training_ray
from workers.training import fit_basis, is_finished
from workers.training_board import MAX_FAILURES, Board


@pytest.fixture(scope="module")
def kills():
    """tests/bench/finetuning_parts/kills.py, which the benchmark shares."""
    path = Path(__file__).parents[1] / "bench" / "finetuning_parts" / "kills.py"
    spec = importlib.util.spec_from_file_location("bench_kills", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def settings(kills, tiny_sd_dir):
    return {**kills.SETTINGS, "base_model": str(tiny_sd_dir), "iterations": 8}


@pytest.fixture(scope="module")
def hours(kills, tiny_sd_dir):
    """Settings whose second iteration is not going to end while a test looks."""
    return {**kills.SETTINGS, "base_model": str(tiny_sd_dir), "iterations": 10_000, "num_workers": 1}


def stuck_fit() -> training_ray._Fit:
    return training_ray._Fit(SimpleNamespace(fit=threading.Event().wait))


def newest(directory: Path) -> int:
    return max((iteration_of(path) for path in directory.glob("checkpoints/iteration_*")), default=0)


# ---- killed


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(1200)  # every restart imports torch and diffusers twice
def test_killed_workers_change_no_bit(cluster, kills, tiny_sd_dir, tmp_path):
    """One kill; the benchmark (tests/bench) does ten, of workers that were restarted."""
    rounds = kills.kill_rounds(1, tmp_path, base_model=str(tiny_sd_dir))
    assert rounds["kills"] == 1
    assert rounds["equal"]


@pytest.mark.slow
@pytest.mark.long
def test_killed_processes_without_ray_change_no_bit(kills, settings, tmp_path):
    """Each process goes on for a random while after a checkpoint of its own, and is killed there."""
    config = TrainConfig.parse({**settings, "num_workers": 0, "iterations": 24})
    whole = fit_basis(config, output_dir=tmp_path / "whole", show_bar=False)
    chance, context = random.Random(0), multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["workers.training"])
    directory, kept = tmp_path / "killed", []
    for _ in range(3):
        process = context.Process(
            target=fit_basis, args=(config,), kwargs={"output_dir": directory, "show_bar": False}, daemon=True
        )
        before = newest(directory)
        process.start()
        wait_for(lambda before=before: newest(directory) > before, "checkpoint")
        time.sleep(chance.uniform(0, 0.3))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        kept.append(newest(directory))
    assert kept == sorted(set(kept))
    assert kept[-1] < config.iterations
    assert kills.same(whole, fit_basis(config, output_dir=directory, show_bar=False))


@pytest.mark.parametrize("module", ["workers.training_board", "workers.training_restarts"])
def test_processes_beside_the_workers_start_without_the_model(module):
    program = f"import sys, {module}; print(sorted({{'diffusers', 'peft', 'transformers'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_restarts_go_on_while_there_is_progress_and_end_without():
    board = Board()
    board.keep(0)
    for iteration in range(1, 12):
        assert not board.crash("killed")
        assert not board.crash("killed")
        board.keep(iteration)
        board.keep(iteration)
    assert [board.crash(f"killed {n}") for n in range(MAX_FAILURES)] == [False] * (MAX_FAILURES - 1) + [True]
    assert board.failure() == f"killed {MAX_FAILURES - 1}"


def test_group_that_never_gets_further_is_given_up():
    board = Board(announced=5)
    outcomes = []
    for _ in range(MAX_FAILURES):
        board.keep(5)
        outcomes.append(board.crash("out of memory"))
    assert outcomes == [False] * (MAX_FAILURES - 1) + [True]


def test_repeated_iterations_are_announced_once():
    board = Board(announced=2)
    for iteration in (0, 1, 2, 3, 4, 3, 4, 5):
        board.post({"iteration": iteration})
    metrics, error = board.drain()
    assert [line["iteration"] for line in metrics] == [3, 4, 5]
    assert error is None
    assert board.drain() == ([], None)


def test_error_of_the_run_ends_it_at_the_next_crash():
    board = Board()
    assert board.enter(0, None)
    board.fail(FinetuneError("first"))
    board.fail(FinetuneError("second"))
    assert str(board.drain()[1]) == "first"
    assert board.over()
    assert board.crash("a peer's connection")
    assert not board.enter(0, None)


def test_early_stopped_run_goes_on_only_when_iterations_were_raised(settings):
    config = TrainConfig.parse(settings)
    state = {"iteration": 5, "finished": True, "history": [{"iteration": 5, "iterations": config.iterations}]}
    assert is_finished(state, config)
    assert not is_finished({**state, "finished": False}, config)
    assert not is_finished(state, config.model_copy(update={"iterations": config.iterations + 1}))
    assert is_finished({**state, "iteration": config.iterations, "finished": False}, config)


# ---- stopped


@pytest.mark.slow
@pytest.mark.long
def test_interrupted_run_ends_its_workers_in_the_middle_of_an_iteration(cluster, kills, settings, tmp_path):
    """Two workers, which the end of one must not leave waiting for the other; the cluster stays up."""
    config = TrainConfig.parse({**settings, "iterations": 2, "num_inference_steps": 40, "images_per_prompt": 24})
    announced = []

    def interrupt(metrics):
        announced.append(metrics["iteration"])
        if metrics["iteration"] == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit_basis(config, output_dir=tmp_path, on_progress=interrupt, show_bar=False)
    wait_for(lambda: not kills.find_workers(), "end of the workers")
    assert newest(tmp_path) == 1
    again = config.model_copy(update={"num_workers": 0})
    result = fit_basis(again, output_dir=tmp_path, on_progress=interrupt, show_bar=False)
    assert announced == [0, 1, 2]
    assert [line["iteration"] for line in result.metrics] == [0, 1, 2]


RUN = """
name = "{name}"
base_model = "{base_model}"
reward = "{reward}"
prompts = ["A red colored car.", "A blue colored cup."]
held_out_prompts = ["A green colored car."]
held_out_images = 2
rank = 2
iterations = 10000
prompts_per_iteration = 1
images_per_prompt = 2
num_inference_steps = 3
train_steps_per_sample = 2
num_workers = 1
"""


@pytest.mark.slow
@pytest.mark.long
def test_killed_command_leaves_no_process_and_a_checkpoint_to_go_on_from(hours, tmp_path):
    """SIGKILL, after which nothing of it can tidy up; what is trained next goes on, without Ray too."""
    run, directory = tmp_path / "run.toml", tmp_path / "out"
    run.write_text(RUN.format(**hours))
    command = [sys.executable, "-m", "flows.cli", "train", str(run), "--no-publish", "-o", str(directory)]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    wait_for(lambda: newest(directory) > 1, "checkpoint")
    family = psutil.Process(process.pid).children(recursive=True)
    assert family
    process.kill()
    process.wait(120)
    _, alive = psutil.wait_procs(family, timeout=120)
    assert alive == []
    kept = newest(directory)
    config = TrainConfig.from_toml(run).model_copy(update={"num_workers": 0, "iterations": kept + 2})
    announced = []
    fit_basis(config, output_dir=directory, on_progress=announced.append, show_bar=False)
    assert [metrics["iteration"] for metrics in announced] == [kept + 1, kept + 2]


def test_failed_run_does_not_wait_for_workers_that_are_stuck(monkeypatch):
    """As on a GPU, where a rank may wait in a sum for one that is gone."""
    stopped = []
    monkeypatch.setattr(training_ray, "_relay", lambda *_: FinetuneError("the reward failed"))
    monkeypatch.setattr(training_ray, "_stop", lambda board, fit: stopped.append(fit))
    fit = stuck_fit()
    with pytest.raises(FinetuneError, match="the reward failed"):
        training_ray._follow(fit, None, lambda metrics: None, "colour")
    assert stopped == [fit]


@pytest.mark.slow
def test_interrupt_in_the_middle_of_waiting_still_ends_workers_that_are_stuck(cluster, monkeypatch):
    """Where a fit was taken for ended, Ray was shut down under it, which ended the command without a word."""
    monkeypatch.setattr(training_ray, "STOP_SECONDS", 0.5)
    monkeypatch.setattr(training_ray, "KILL_SECONDS", 0.5)
    board, worker = (ray.remote(num_cpus=0)(Board).remote() for _ in range(2))
    ray.get(board.enter.remote(0, worker))
    before = signal.signal(signal.SIGUSR1, signal.default_int_handler)
    try:
        threading.Timer(0.3, signal.pthread_kill, (threading.get_ident(), signal.SIGUSR1)).start()
        with pytest.raises(KeyboardInterrupt):
            training_ray._follow(stuck_fit(), board, lambda metrics: None, "colour")
    finally:
        signal.signal(signal.SIGUSR1, before)
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(worker.over.remote())


@pytest.mark.slow
def test_run_whose_workers_left_before_its_end_is_no_result(hours, tmp_path, monkeypatch):
    monkeypatch.setattr(training_ray, "_follow", lambda *_: None)
    with pytest.raises(FinetuneError, match="was stopped on Ray before its end: run it again to resume"):
        fit_basis(TrainConfig.parse(hours), output_dir=tmp_path, show_bar=False)


# ---- refused


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "expected"),
    [({"num_workers": 3}, "num_workers is 3: the Ray cluster has 2 CPUs"), ({"use_gpu": True}, "has 0 GPUs")],
)
def test_private_cluster_has_what_the_machine_has(settings, tmp_path, monkeypatch, changes, expected):
    monkeypatch.setattr(training_ray.os, "cpu_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    config = TrainConfig.parse({**settings, "held_out_images": 6, **changes})
    with pytest.raises(ConfigError, match=expected):
        fit_basis(config, output_dir=tmp_path, show_bar=False)


def test_other_settings_are_refused_before_ray_starts(settings, tmp_path, monkeypatch):
    config = TrainConfig.parse({**settings, "num_workers": 0, "iterations": 1})
    fit_basis(config, output_dir=tmp_path, show_bar=False)

    def never(**_):
        raise AssertionError("Ray was started")

    monkeypatch.setattr(training_ray, "ray_session", never)
    other = config.model_copy(update={"num_workers": 2, "kl_weight": 0.7, "rank": 3})
    with pytest.raises(ResumeError, match=r"kl_weight: 0\.01 -> 0\.7; rank: 2 -> 3"):
        fit_basis(other, output_dir=tmp_path, show_bar=False)


def test_directory_that_takes_no_checkpoint_is_named(settings, tmp_path):
    config = TrainConfig.parse({**settings, "num_workers": 0, "iterations": 1})
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"iteration 1 cannot be written to .*file/below"):
        fit_basis(config, output_dir=tmp_path / "out", storage_path=tmp_path / "file" / "below", show_bar=False)
