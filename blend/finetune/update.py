"""One optimiser step of the policy over the transitions of an iteration, in micro-batches."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from blend.conditioning import Conditioning
from blend.ddim import log_prob_of
from blend.finetune.config import TrainConfig
from blend.finetune.errors import NonFiniteError, StoppedError
from blend.finetune.objectives import OBJECTIVES, regularised_loss, transition_kl
from blend.finetune.policy import REWARDED_STD, Policy, Transitions
from blend.finetune.rollout import Request
from blend.finetune.workgroup import Workgroup

WEIGHT_DECAY = 1e-4
# float16 gradients of single transitions would fall below its smallest numbers
HALF_LOSS_SCALE = 256.0


@dataclass(frozen=True, slots=True)
class Batch:
    """What one iteration learns from: this worker's M transitions of the global batch `plan`."""

    iteration: int  # counted from 0
    plan: Sequence[Request]
    transitions: Transitions
    text: Conditioning  # rows of the prompts that the transitions count
    gains: Tensor  # [M] advantages
    kl_weight: float  # alpha in force


class PolicyUpdate:
    """The adapter's optimiser and what it minimises."""

    def __init__(
        self, config: TrainConfig, policy: Policy, parameters: Sequence[nn.Parameter], workgroup: Workgroup
    ) -> None:
        self.config = config
        self.policy = policy
        self.parameters = parameters
        self.workgroup = workgroup
        self.policy_loss = OBJECTIVES[config.objective].policy_loss
        self.optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=WEIGHT_DECAY)
        self.loss_scale = HALF_LOSS_SCALE if policy.model.dtype == torch.float16 else 1.0

    def run(self, batch: Batch, part: int, should_stop: Callable[[], bool] = lambda: False) -> dict[str, float]:
        """Step once over the transitions whose slot falls to update number `part`; the means over all workers.

        Raises NonFiniteError before the step, StoppedError between micro-batches.
        """
        transitions = batch.transitions
        mine = (transitions.slot % self.config.updates_per_iteration == part).nonzero().flatten()
        total = self.workgroup.sum_(transitions.weight[mine].sum().reshape(1).cpu()).item()
        flags = torch.zeros(len(batch.plan), self.config.num_inference_steps)
        sums = torch.zeros(3, dtype=torch.float64)
        self.optimizer.zero_grad(set_to_none=True)
        size = max(1, self.config.micro_batch_rows // self.policy.rows_per_transition)
        recomputing = self.policy.bank.recomputing if self.config.gradient_checkpointing else nullcontext
        for index in mine.split(size):
            if should_stop():
                raise StoppedError(f"{self.config.name!r} was stopped in iteration {batch.iteration + 1}: run it again")
            one = transitions.select(index)
            with recomputing():
                loss, deviation, clipped = (one.weight * v for v in self._losses(one, batch, batch.gains[index]))
                # times D: the gradient of J per step, of a size that Adam's epsilon and grad_clip are made for
                (loss.sum() * one.latents[0].numel() * self.loss_scale / total).backward()
            flags[one.sample.cpu(), one.step.cpu()] += (~loss.detach().isfinite()).float().cpu()
            sums += torch.stack([v.detach().double().sum().cpu() for v in (loss, deviation, clipped)])
        self.workgroup.sum_gradients(self.parameters)
        self._require_finite(self.workgroup.sum_(flags), batch)
        norm = self._step(batch)
        loss_mean, deviation_mean, clipped_mean = (self.workgroup.sum_(sums) / total).tolist()
        return {"loss": loss_mean, "ratio_deviation": deviation_mean, "clipped": clipped_mean, "grad_norm": norm}

    def _losses(self, part: Transitions, batch: Batch, gains: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Per transition [M]: loss, |ratio - 1|, and whether the ratio is clipped."""
        mean, std = self.policy.transition(part, batch.text.rows(part.text))
        log_prob = log_prob_of(part.prev_latents.float(), mean, std)
        kl = transition_kl(mean, part.base_means, std)
        gains = gains * (std >= REWARDED_STD)
        if self.config.rewarded_steps:
            gains = gains * (part.step < self.config.rewarded_steps)
        policy_loss = self.policy_loss(log_prob, part.log_probs, gains, self.config.clip_range)
        deviation = (torch.exp(log_prob - part.log_probs) - 1).abs()
        return (
            regularised_loss(policy_loss, kl, batch.kl_weight),
            deviation,
            (deviation > self.config.clip_range).float(),
        )

    def _step(self, batch: Batch) -> float:
        """Clip the gradients and step; the norm before clipping."""
        for parameter in self.parameters:
            assert parameter.grad is not None
            parameter.grad /= self.loss_scale
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.grad_clip)
        if not norm.isfinite():
            raise NonFiniteError(
                f"iteration {batch.iteration + 1}: the gradient norm is {norm.item()} over prompts "
                f"{sorted({r.prompt for r in batch.plan})[:3]}, seeds from {batch.plan[0].seed}; lower learning_rate"
            )
        self.optimizer.step()
        return norm.item()

    def _require_finite(self, flags: Tensor, batch: Batch) -> None:
        bad = flags.nonzero().tolist()
        if bad:
            sample, step = bad[0]
            raise NonFiniteError(
                f"iteration {batch.iteration + 1}: the loss is NaN or infinite at {len(bad)} transitions, "
                f"first step {step} of {batch.plan[sample]}; lower learning_rate or raise kl_weight"
            )
