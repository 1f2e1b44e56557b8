"""The shipped training runs: valid, with prompts, and complete for one GPU and for eight."""

import re
import tomllib
from pathlib import Path

import pytest

from blend.finetune.config import TrainConfig
from blend.finetune.prompts import load_prompts
from blend.rewards import REWARDS
from blend.sprites.captions import COLOURS

RUNS = Path(__file__).parents[1] / "infra" / "runs"
TRAINING = sorted(RUNS.glob("train_*.toml"))
ON_GPUS = {"train_sd15_1gpu": 1, "train_sd15_8gpu": 8, "train_sdxl_1gpu": 1, "train_sdxl_8gpu": 8}


@pytest.mark.parametrize("path", TRAINING, ids=lambda path: path.stem)
def test_runs_are_valid_and_their_prompts_disjoint(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # relative prompt files are found beside the run file
    config = TrainConfig.from_toml(path)
    assert {*config.rewards, *config.guard.watch} <= set(REWARDS)
    prompts = load_prompts(config.prompts, key="prompts")
    held_out = load_prompts(config.held_out_prompts, key="held_out_prompts")
    assert not set(prompts) & set(held_out)
    assert len(prompts) >= config.prompts_per_iteration
    assert len(held_out) >= config.held_out_images // config.held_out_images_per_prompt


@pytest.mark.parametrize(("name", "gpus"), ON_GPUS.items())
def test_gpu_runs_say_every_choice_and_share_it_evenly(name, gpus):
    text = (RUNS / f"{name}.toml").read_text()
    config = TrainConfig.from_toml(RUNS / f"{name}.toml")
    assert (config.use_gpu, config.num_workers) == (True, gpus)
    assert config.batch_size % gpus == 0
    assert config.kl_target is not None
    assert config.guard.kl is not None
    assert config.guard.kl > config.kl_target
    explained = set(tomllib.loads(text))
    needed = {"kl_weight", "micro_batch_rows", "gradient_checkpointing", "dtype", "eval_every", "checkpoint_every"}
    assert needed <= explained
    assert len(re.findall(r"^#", text, re.MULTILINE)) > 0.4 * len(explained)


def test_prompt_files_follow_the_grammar():
    one = re.compile(rf"An? ({'|'.join(COLOURS)}) colored [a-z ]+\.")
    two = re.compile(rf"An? ({'|'.join(COLOURS)}) [a-z ]+ and an? ({'|'.join(COLOURS)}) [a-z ]+\.")
    seen = {}
    for name in ("prompts_train", "prompts_held_out"):
        lines = (RUNS / f"{name}.txt").read_text().splitlines()
        assert [line for line in lines if not (one.fullmatch(line) or two.fullmatch(line))] == []
        assert not [line for line in lines if re.search(r"\ba orange|\ban (?!orange)", line, re.IGNORECASE)]
        things = [part for line in lines for part in re.split(r" and ", line.lower().rstrip("."))]
        seen[name] = {re.sub(r"^an? | colored", "", thing) for thing in things}
    assert not seen["prompts_train"] & seen["prompts_held_out"]
