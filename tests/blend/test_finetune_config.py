"""Run files: what is accepted, and that every error names the key."""

from pathlib import Path

import pytest

from blend.finetune.config import TrainConfig, require_resumable
from blend.finetune.errors import ConfigError, ResumeError
from blend.finetune.prompts import load_prompts

MINIMAL = {"name": "colour", "reward": "colourfulness"}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"learning_rte": 1e-3}, "unknown key 'learning_rte'"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0"),
        ({"kl_weight": float("nan")}, "kl_weight is nan"),
        ({"objective": "reinforce"}, "objective is 'reinforce'.*'dpok', 'ddpo' or 'grpo'"),
        ({"train_steps_per_sample": 30}, "train_steps_per_sample is 30: at most num_inference_steps"),
        ({"updates_per_iteration": 11}, "updates_per_iteration is 11: at most the 10 trained steps"),
        (
            {"updates_per_iteration": 20, "train_steps_per_sample": 20},
            "updates_per_iteration is 20: at most the 19 trained steps that have a gradient",
        ),
        ({"images_per_prompt": 1}, "images_per_prompt is 1.*dpok"),
        ({"eta": 0.0}, "eta is 0.0"),
        ({"num_workers": 65}, "num_workers is 65: more than the 64 images"),
        ({"num_workers": 3, "held_out_images": 4}, r"num_workers is 3: .* held_out_images \(4\) has 2"),
        ({"name": "No Good"}, "name is 'No Good'"),
        ({"kl_target": 100.0, "kl_weight": 0.0}, "kl_target is 100 and kl_weight 0"),
        ({"kl_target": -1.0}, "kl_target is -1.0"),
        ({"guard": {"watch": {"colourfulness": 1.0}}}, "guard.watch names 'colourfulness', the trained reward"),
        ({"guard": {"kls": 1.0}}, "unknown key 'guard.kls'"),
        ({"guard": {"drop": 0.0}}, "guard.drop is 0.0"),
        ({"step_choice": "all"}, "step_choice is 'all'.*'random' or 'window'"),
        ({"reward_actors": 1, "num_workers": 0}, "reward_actors is 1 and num_workers 0"),
    ],
)
def test_bad_setting_is_named(changes, expected):
    with pytest.raises(ConfigError, match=expected):
        TrainConfig.parse({**MINIMAL, **changes})


def test_missing_reward_is_named():
    with pytest.raises(ConfigError, match="reward is missing"):
        TrainConfig.parse({"name": "colour"})


def test_run_file_round_trip_and_relative_prompts(tmp_path: Path):
    (tmp_path / "prompts.txt").write_text("A red colored car.\n\nA blue cup.\nA blue cup.\n")
    run = tmp_path / "run.toml"
    run.write_text('name = "colour"\nreward = "colourfulness"\nprompts = "prompts.txt"\nkl_weight = 0.5\n')
    config = TrainConfig.from_toml(run)
    assert config.kl_weight == 0.5
    assert load_prompts(config.prompts, key="prompts") == ("A red colored car.", "A blue cup.")


@pytest.mark.parametrize("text", ["name = ", "name = 'a'\nname = 'b'"])
def test_broken_toml_names_the_file(tmp_path: Path, text):
    run = tmp_path / "run.toml"
    run.write_text(text)
    with pytest.raises(ConfigError, match=r"run\.toml: not a TOML file"):
        TrainConfig.from_toml(run)


def test_absent_run_file(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"absent\.toml: cannot be read"):
        TrainConfig.from_toml(tmp_path / "absent.toml")


@pytest.mark.parametrize(
    ("content", "expected"), [(b"", "no prompts"), (b"\xff\xfe\x00", "not UTF-8"), (None, "cannot be read")]
)
def test_bad_prompt_file_names_the_key(tmp_path: Path, content, expected):
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"held_out_prompts.*{expected}"):
        load_prompts(str(path), key="held_out_prompts")


def test_named_sets_do_not_overlap():
    train, test = load_prompts("sprites-train", key="prompts"), load_prompts("sprites-test", key="prompts")
    assert train
    assert test
    assert not set(train) & set(test)


def test_resume_names_the_differing_keys():
    config = TrainConfig.parse(MINIMAL)
    longer = TrainConfig.parse({**MINIMAL, "iterations": 99, "num_workers": 2})
    require_resumable(config, {**longer.training_facts(), "base_hash": "a"}, "a")
    other = {**TrainConfig.parse({**MINIMAL, "seed": 3, "learning_rate": 0.5}).training_facts(), "base_hash": "b"}
    with pytest.raises(ResumeError, match=r"base_hash: 'b' -> 'a'; learning_rate: 0\.5 -> 0\.002; seed: 3 -> 0"):
        require_resumable(config, other, "a")


def test_digest_follows_what_is_trained():
    digests = {
        TrainConfig.parse({**MINIMAL, **changes}).digest
        for changes in ({}, {"seed": 1}, {"kl_weight": 0.0}, {"iterations": 9}, {"rank": 8})
    }
    assert len(digests) == 5
    assert TrainConfig.parse({**MINIMAL, "num_workers": 2}).digest == TrainConfig.parse(MINIMAL).digest


@pytest.mark.parametrize("path", sorted(Path("infra/runs").glob("train_*.toml")), ids=lambda path: path.stem)
def test_shipped_run_files_are_valid(path):
    TrainConfig.from_toml(path)
