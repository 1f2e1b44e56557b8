"""Rewards on Ray actors: the same adapter bit for bit, also when an actor is killed, and errors that say what to do."""

import os
import signal
from pathlib import Path

import psutil
import pytest
import torch
from ray.util import placement_group, remove_placement_group
from safetensors.torch import load_file

from blend.finetune.checkpoint import ADAPTER_FILE
from blend.finetune.config import TrainConfig
from blend.finetune.errors import ConfigError, FinetuneError
from blend.rewards import AsyncReward, Reward, RewardError, load_reward, start_scoring
from workers.reward_actors import RewardActor, gpus_of, reward_actors
from workers.training import TrainJob, fit_basis

SETTINGS = {
    "name": "colour",
    "reward": "colourfulness",
    "prompts": ("A red colored car.", "A blue colored cup.", "A green colored bird."),
    "held_out_prompts": ("A red colored cup.", "A green colored car."),
    "held_out_images": 4,
    "rank": 2,
    "iterations": 3,
    "prompts_per_iteration": 2,
    "images_per_prompt": 2,
    "num_inference_steps": 3,
    "train_steps_per_sample": 2,
    "learning_rate": 1e-2,
    "eval_every": 1,
}


@pytest.fixture(scope="session")
def settings(tiny_sd_dir: Path):
    return {**SETTINGS, "base_model": str(tiny_sd_dir)}


@pytest.fixture(scope="module")
def cluster(cluster):
    """As many CPUs free as the runs have workers: what is left over for actors is nothing."""
    taken = placement_group([{"CPU": 1}])
    assert taken.wait(60)
    yield cluster
    remove_placement_group(taken)


@pytest.fixture(scope="module")
def expected(settings, tmp_path_factory):
    """The run that scores in its own process."""
    return fit_basis(
        TrainConfig.parse({**settings, "num_workers": 0}), output_dir=tmp_path_factory.mktemp("plain"), show_bar=False
    )


def on_actors(settings, count=1, **changes):
    return TrainConfig.parse({**settings, "num_workers": 1, "reward_actors": count, **changes})


def actor_processes() -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::RewardActor"):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return found


def assert_same_adapter(one, other):
    first, second = (load_file(result.adapter_dir / ADAPTER_FILE) for result in (one, other))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    for key in ("held_out_mean", "reward_mean", "path_kl"):
        assert [line.get(key) for line in one.metrics] == [line.get(key) for line in other.metrics]


@pytest.mark.slow
@pytest.mark.long
def test_actors_killed_while_they_score_change_nothing(cluster, settings, expected, tmp_path, monkeypatch):
    """The adapter is, bit for bit, that of a run that scores in its own process."""
    calls = tmp_path / "calls"
    calls.mkdir()

    class Fragile(RewardActor):
        def score(self, name, images, prompts):
            count = len(list(calls.iterdir()))
            (calls / str(count)).touch()
            if count in (1, 4, 5):
                os.kill(os.getpid(), signal.SIGKILL)
            return super().score(name, images, prompts)

    monkeypatch.setattr("workers.reward_actors.RewardActor", Fragile)
    survived = fit_basis(on_actors(settings, 2), output_dir=tmp_path / "run", show_bar=False)
    # one batch per evaluation and rollout, and three of them again
    assert len(list(calls.iterdir())) == (4 + 3) + 3
    assert_same_adapter(survived, expected)


@pytest.mark.slow
def test_actors_stand_for_every_reward_of_the_run(cluster, settings):
    images, prompts = torch.rand(5, 3, 64, 64), ["A red colored car."] * 5
    config = on_actors(settings, 2, guard={"watch": {"alignment": 1.0}})
    with reward_actors(config) as rewards:
        assert len(actor_processes()) == 2
        assert rewards.keys() == {"colourfulness", "alignment"}
        for name, reward in rewards.items():
            plain = load_reward(name)
            assert isinstance(reward, Reward)
            assert isinstance(reward, AsyncReward)
            assert (reward.name, reward.version, reward.range) == (plain.name, plain.version, plain.range)
            waits = [start_scoring(reward, images, prompts) for _ in range(3)]
            assert all(torch.equal(wait(), plain(images, prompts)) for wait in waits)
            assert torch.equal(reward(images, prompts), plain(images, prompts))
        with pytest.raises(RewardError, match="alignment scores 64 x 64 pictures"):
            rewards["alignment"](images[:, :, :32, :32], prompts)


@pytest.mark.slow
def test_a_batch_that_kills_every_actor_ends_the_run(cluster, settings, monkeypatch):
    class Doomed(RewardActor):
        def score(self, name, images, prompts):
            os._exit(1)

    monkeypatch.setattr("workers.reward_actors.RewardActor", Doomed)
    with reward_actors(on_actors(settings)) as rewards:
        wait = rewards["colourfulness"].submit(torch.rand(1, 3, 64, 64), ["a"])
        with pytest.raises(FinetuneError, match="its actor died, and so did those that took its place"):
            wait()


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("count", [0, 1])
def test_an_error_of_the_reward_reaches_the_caller(cluster, settings, tmp_path, count):
    """On an actor, and in this process."""
    config = on_actors(settings, count, reward="alignment", num_workers=count)
    with pytest.raises(
        FinetuneError, match=r"the reward 'alignment' failed on 4 images, first 'A red .*\(seed \d+\).*64 x 64"
    ):
        fit_basis(config, output_dir=tmp_path, show_bar=False)


@pytest.mark.slow
def test_more_gpus_than_the_cluster_has_are_refused(cluster, settings, tmp_path):
    config = on_actors(settings, 3, reward="alignment", reward_gpus=0.5)
    with pytest.raises(
        ConfigError, match=r"reward_gpus is 0.5 and reward_actors 3: they need 2 GPUs and the Ray cluster has 0"
    ):
        fit_basis(config, output_dir=tmp_path, show_bar=False)


@pytest.mark.parametrize(
    ("actors", "each", "expected"), [(3, 0, 0), (2, 1, 2), (2, 2.0, 4), (3, 0.5, 2), (3, 0.6, 3), (10, 0.1, 1)]
)
def test_gpus_are_shared_by_as_many_actors_as_fit(actors, each, expected):
    assert gpus_of(actors, each) == expected


def test_a_share_of_several_gpus_is_refused():
    with pytest.raises(ConfigError, match=r"reward_gpus is 1\.5: use a share of one GPU, or a whole number"):
        gpus_of(1, 1.5)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"guard": {"watch": {"beauty": 1.0}}}, "guard.watch has 'beauty': unknown reward 'beauty'; choose one of col"),
        ({"reward": "beauty"}, "reward is 'beauty': unknown reward 'beauty'; choose one of colourfulness"),
        ({"reward_gpus": 1.0}, "reward_gpus is 1: 'colourfulness' is computed on the CPU and leaves them idle"),
    ],
)
def test_bad_rewards_are_refused_before_any_work(settings, changes, expected):
    with pytest.raises(ConfigError, match=expected):
        TrainJob.prepare(on_actors(settings, **changes))
