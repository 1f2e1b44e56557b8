"""The value network of DPOK: V(x_t, text, t) predicts a path's standardised reward from one of its states."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blend.conditioning import Conditioning
from blend.finetune.config import TrainConfig
from blend.finetune.policy import Transitions
from blend.finetune.rollout import keyed_permutation
from blend.finetune.workgroup import Workgroup
from blend.model import DiffusionModel

WIDTH = 32
# steps per iteration as in the paper, at ten times its learning rate: runs may have few iterations
STEPS = 5
BATCH = 256
LEARNING_RATE = 1e-3


class ValueNetwork(nn.Module):
    """Latents [N, C, h, w], pooled text [N, D] and timesteps [N] -> values [N]; zero before it is trained.

    Departure from DPOK, whose network is not described: two convolutions summarise the latents.
    """

    def __init__(self, latent_channels: int, text_width: int, *, seed: int) -> None:
        super().__init__()
        self.latent = nn.Sequential(
            nn.Conv2d(latent_channels, WIDTH, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(WIDTH, WIDTH, 3, stride=2, padding=1),
            nn.SiLU(),
        )
        self.text = nn.Linear(text_width, WIDTH)
        self.hidden = nn.Linear(3 * WIDTH, 2 * WIDTH)
        self.out = nn.Linear(2 * WIDTH, 1)
        generator = torch.Generator().manual_seed(seed)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5), generator=generator)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        nn.init.zeros_(self.out.weight)

    def forward(self, latents: Tensor, text: Tensor, timesteps: Tensor) -> Tensor:
        """Values [N] in standard deviations of the base's reward."""
        features = torch.cat([self.latent(latents).mean((2, 3)), self.text(text), timestep_features(timesteps)], dim=1)
        return self.out(F.silu(self.hidden(F.silu(features)))).squeeze(1)


def timestep_features(timesteps: Tensor) -> Tensor:
    """Sinusoidal features of integer timesteps, [N] -> [N, WIDTH]."""
    half = WIDTH // 2
    rates = torch.exp(torch.arange(half, device=timesteps.device) * (-math.log(10_000.0) / half))
    angles = timesteps.float()[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class ValueBaseline:
    """The value network and its optimiser, fitted on an iteration's transitions before advantages are taken."""

    def __init__(self, config: TrainConfig, model: DiffusionModel, workgroup: Workgroup) -> None:
        self.config = config
        self.workgroup = workgroup
        channels, text_width = model.latent_channels, model.encode_prompts([""]).embeds.shape[-1]
        self.network = ValueNetwork(channels, text_width, seed=config.seed).to(model.device)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=LEARNING_RATE)

    def predict(self, transitions: Transitions, text: Conditioning) -> Tensor:
        """Values [M] of recorded states; text holds the N rows that their `text` counts."""
        pooled = text.embeds.float().mean(1)
        with torch.no_grad():
            return torch.cat([self._values(transitions.select(i), pooled) for i in self._parts(len(transitions))])

    def fit(self, transitions: Transitions, text: Conditioning, targets: Tensor, iteration: int) -> float:
        """STEPS MSE steps on random batches of the global transitions; returns the last loss."""
        pooled = text.embeds.float().mean(1)
        slots = self.config.train_steps_per_sample
        owned = zip(transitions.sample.tolist(), transitions.slot.tolist(), strict=True)
        place = {sample * slots + slot: i for i, (sample, slot) in enumerate(owned)}
        loss = torch.zeros(())
        for step in range(STEPS):
            order = keyed_permutation(self.config.batch_size * slots, self.config.seed, "value", iteration, step)
            index = torch.tensor([place[i] for i in order[:BATCH] if i in place], dtype=torch.long)
            part = transitions.select(index)
            squared = (self._values(part, pooled) - targets[index]).square()
            loss = squared.sum() / min(BATCH, len(order))
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.workgroup.sum_gradients(self.network.parameters())
            self.optimizer.step()
        return self.workgroup.sum_(loss.detach().clone()).item()

    def _values(self, part: Transitions, pooled: Tensor) -> Tensor:
        return self.network(part.latents.float(), pooled[part.text], part.timesteps)

    def _parts(self, count: int) -> list[slice]:
        return [slice(start, start + BATCH) for start in range(0, count, BATCH)]

    def state_dict(self) -> dict[str, Any]:
        """Network and optimiser."""
        return {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what state_dict gave."""
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
