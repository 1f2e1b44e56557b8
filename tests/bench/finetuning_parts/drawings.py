"""What the rewards give the world's own drawings, which the base was trained on: how much there is to gain honestly."""

import random

import numpy as np
import torch
from torch import Tensor

from blend.finetune.config import TrainConfig
from blend.finetune.prompts import load_prompts
from blend.finetune.rollout import plan_held_out
from blend.rewards import load_reward
from blend.sprites.captions import parse_caption
from blend.sprites.scene import render_things


def score_drawings(config: TrainConfig) -> Tensor:
    """Rewards [N] of one drawing for each held-out image of the run, of the prompt that it has."""
    plan = plan_held_out(config, load_prompts(config.held_out_prompts, key="held_out_prompts"))
    drawings = [render_things(parse_caption(one.prompt), random.Random(one.seed)) for one in plan]
    images = torch.from_numpy(np.stack(drawings)).permute(0, 3, 1, 2).float() / 255
    return load_reward(config.reward)(images, [one.prompt for one in plan])
