"""Rewards of other packages where work is spread: on reward actors, in evaluations, in training runs."""

import sys

import pandas as pd
import pytest
import torch
from plugin_packages import MODULE, on_path, put_package

from blend.finetune.config import TrainConfig
from blend.finetune.errors import ConfigError
from blend.rewards import load_reward
from blend.rewards.contract import ContractError, check_reward
from workers.evaluation import EvaluateConfig, EvaluationError, evaluate
from workers.evaluation.scoring import Scorer
from workers.evaluation.storing import prepare
from workers.reward_actors import remote_rewards, reward_actors
from workers.training import TrainJob

pytestmark = pytest.mark.usefixtures("coarse_figures")

CONFIG = EvaluateConfig(
    bundle="rivals@1",
    prompts=("A red colored car.", "A blue colored cup."),
    seeds=(3, 5),
    methods=("mpa",),
    pair_weights=(),
    num_workers=0,
    resamples=100,
    picture_prompts=1,
).model_copy(update={"rewards": ("symmetry",)})  # not validated here, where the plugin is not installed


@pytest.fixture(scope="module")
def symmetry(plugin_site):
    """The plugin is installed for this process too."""
    with on_path(plugin_site):
        yield


@pytest.fixture
def lonely(tmp_path):
    """A plugin that this process has and the cluster's other machines lack."""
    put_package(tmp_path, "lonely", {"lonely": "lonely:Symmetry"}, MODULE.replace('"symmetry"', '"lonely"'))
    with on_path(tmp_path):
        yield


@pytest.fixture(scope="module")
def expected(symmetry, rivals_store_url, tmp_path_factory):
    """The evaluation that scores in its own process."""
    return evaluate(prepare(CONFIG, rivals_store_url), tmp_path_factory.mktemp("here"))


def test_an_evaluation_scores_by_a_plugin(expected):
    assert expected.frame["symmetry"].between(0, 1).all()
    assert {"symmetry", "symmetry_low", "symmetry_high", "symmetry_gain"} <= set(expected.summary)
    assert expected.facts.rewards["symmetry"] == "1"
    assert EvaluateConfig(rewards=("symmetry", "symmetry")).rewards == ("symmetry",)


@pytest.mark.slow
@pytest.mark.long
def test_an_evaluation_on_ray_scores_by_a_plugin_on_an_actor(cluster, expected, rivals_store_url, tmp_path):
    planned = prepare(CONFIG.model_copy(update={"num_workers": 1, "reward_actors": 1}), rivals_store_url)
    assert planned.digest == prepare(CONFIG, rivals_store_url).digest
    frame = evaluate(planned, tmp_path / "there").frame
    pd.testing.assert_frame_equal(
        frame.drop(columns=["seconds", "memory_mb"]),
        expected.frame.drop(columns=["seconds", "memory_mb"]),
        check_exact=True,
    )


@pytest.mark.slow
def test_a_plugin_on_the_actors_of_a_training_run_is_the_plugin_itself(cluster, symmetry, tiny_sd_dir):
    config = TrainConfig(name="symmetry", reward="symmetry", base_model=str(tiny_sd_dir), reward_actors=1)
    assert TrainJob.prepare(config).config.reward == "symmetry"
    images, prompts = torch.rand(3, 3, 16, 16), ["A red colored car."] * 3
    with reward_actors(config) as rewards:
        remote, plain = rewards["symmetry"], load_reward("symmetry")
        assert (remote.version, remote.range) == (plain.version, plain.range)
        assert torch.equal(remote(images, prompts), plain(images, prompts))
        check_reward(remote, size=16)
        remote.range = (0.0, 0.5)
        with pytest.raises(ContractError, match="range"):
            check_reward(remote, size=16)


LACKED = r"cannot load .*unknown reward '\w+'; .*\(a plugin must be installed on every machine\)"


@pytest.mark.slow
def test_a_plugin_that_an_actor_lacks_is_one_clear_error(cluster, lonely):
    with pytest.raises(ConfigError, match=f"a reward actor {LACKED}"), remote_rewards(["lonely"], 1):
        pass


def test_a_plugin_that_a_worker_lacks_is_one_clear_error(plugin_site, rivals_store_url, symmetry, monkeypatch):
    scorer = Scorer(prepare(CONFIG, rivals_store_url).job)
    monkeypatch.setattr("sys.path", [place for place in sys.path if place != str(plugin_site)])
    with pytest.raises(EvaluationError, match=f"a worker {LACKED}"):
        scorer.ready()


@pytest.mark.slow
def test_gpus_that_are_not_there_are_refused(cluster, symmetry, rivals_store_url, tmp_path):
    config = CONFIG.model_copy(update={"num_workers": 1, "reward_actors": 2, "reward_gpus": 0.5})
    with pytest.raises(EvaluationError, match="they need 1 GPUs and the Ray cluster has 0"):
        evaluate(prepare(config, rivals_store_url), tmp_path)


def test_a_reward_that_fails_is_named_with_the_prompt(symmetry, rivals_store_url, tmp_path):
    config = CONFIG.model_copy(update={"rewards": ("symmetry", "alignment")})
    with pytest.raises(EvaluationError, match=r"rewards: alignment failed on 4 images, the first of 'A red .* 64 x 64"):
        evaluate(prepare(config, rivals_store_url), tmp_path)


@pytest.mark.parametrize("name", ["seed", "share", "w_bright", "symmetry_low"])
def test_a_plugin_with_the_name_of_a_column_is_refused(name, tmp_path, rivals_store_url):
    put_package(tmp_path, name, {name: f"{name}_plugin:Symmetry"}, MODULE, file=f"{name}_plugin.py")
    with on_path(tmp_path), pytest.raises(EvaluationError, match=f"rewards: '{name}' is also a column of the tables"):
        prepare(CONFIG.model_copy(update={"rewards": (name,)}), rivals_store_url)


def test_actors_without_ray_are_refused():
    with pytest.raises(EvaluationError, match="reward_actors is 1 and num_workers 0") as told:
        EvaluateConfig.parse({"reward_actors": 1, "num_workers": 0})
    assert told.value.key == "reward_actors"
