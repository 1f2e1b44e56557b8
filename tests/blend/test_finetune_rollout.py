"""What an iteration makes: prompts, seeds and trained steps follow from the settings, not from the workers."""

import pytest
import torch

from blend.finetune.config import TrainConfig
from blend.finetune.rollout import choose_steps, plan_held_out, plan_requests
from blend.finetune.workgroup import Workgroup

TRAIN = ("A red colored car.", "A blue colored cup.", "A green colored bird.")
HELD_OUT = ("A red colored cup.", "A green colored car.")
SETTINGS = {
    "name": "colour",
    "reward": "colourfulness",
    "held_out_images": 4,
    "prompts_per_iteration": 2,
    "images_per_prompt": 3,
    "num_inference_steps": 4,
    "train_steps_per_sample": 2,
}


class Slice(Workgroup):
    """One of two workers, seen from its slices alone."""

    def __init__(self, rank):
        self.rank, self.size = rank, 2


def test_slices_cover_the_global_batch_once():
    covered = [i for rank in (0, 1) for i in Slice(rank).slice(7)]
    assert covered == list(range(7))


def test_a_batch_depends_on_seed_and_iteration_only():
    config = TrainConfig.parse(SETTINGS)
    first = plan_requests(config, TRAIN, 0)
    assert first == plan_requests(TrainConfig.parse({**SETTINGS, "num_workers": 2}), TRAIN, 0)
    other_seed = TrainConfig.parse({**SETTINGS, "seed": 1})
    for other in (plan_requests(config, TRAIN, 1), plan_requests(other_seed, TRAIN, 0)):
        assert [request.seed for request in first] != [request.seed for request in other]
    assert len({request.seed for request in first}) == len(first)
    assert [request.group for request in first] == [0, 0, 0, 1, 1, 1]
    held_out = plan_held_out(config, HELD_OUT)
    assert held_out == plan_held_out(other_seed, HELD_OUT)
    assert len({(request.prompt, request.seed) for request in held_out}) == 4


def test_trained_steps_are_a_random_subset():
    config = TrainConfig.parse({**SETTINGS, "num_inference_steps": 10, "train_steps_per_sample": 4})
    drawn = [choose_steps(config, 0, index, range(9)) for index in range(200)]
    assert all(set(weights.values()) == {9 / 4} for weights in drawn)
    chosen = [list(weights) for weights in drawn]
    assert all(len(set(steps)) == 4 for steps in chosen)
    counts = torch.bincount(torch.tensor(chosen).flatten(), minlength=10)
    assert counts[9] == 0
    assert counts[:9].min() > 60


def test_rewarded_steps_are_all_trained_and_the_drawn_others_stand_for_the_rest():
    config = TrainConfig.parse(
        {**SETTINGS, "num_inference_steps": 10, "train_steps_per_sample": 5, "rewarded_steps": 3}
    )
    for index in range(50):
        weights = choose_steps(config, 0, index, range(9))
        assert len(weights) == 5
        assert [weights[step] for step in range(3)] == [1.0] * 3
        assert sum(weights.values()) == pytest.approx(9)
    others = {step for index in range(50) for step in choose_steps(config, 0, index, range(9))}
    assert others == set(range(9))
