"""Trainer: policy-gradient fine-tuning of one adapter, one iteration at a time. Knows no files, no Ray."""

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from blend.adapters import AdapterBank
from blend.conditioning import Conditioning
from blend.ddim import log_prob_of
from blend.engine import BlendEngine
from blend.finetune import advantages
from blend.finetune.config import TrainConfig, require_resumable
from blend.finetune.errors import FinetuneError, NonFiniteError
from blend.finetune.objectives import OBJECTIVES, regularised_loss, transition_kl
from blend.finetune.policy import REWARDED_STD, Policy, Transitions
from blend.finetune.rollout import Request, Sampler, Scored, choose_steps, plan_held_out, plan_requests
from blend.finetune.value import ValueBaseline
from blend.finetune.workgroup import Workgroup
from blend.model import DiffusionModel
from blend.rewards import Reward

ENGINE_ROWS = 64
WEIGHT_DECAY = 1e-4
SHEET_IMAGES = 8
Metrics = dict[str, Any]


class Trainer:
    """Owns adapter, optimiser and baselines; `iterate` is one outer loop, `evaluate` the held-out score."""

    def __init__(
        self,
        config: TrainConfig,
        model: DiffusionModel,
        reward: Reward,
        prompts: Sequence[str],
        held_out_prompts: Sequence[str],
        workgroup: Workgroup | None = None,
        *,
        base_hash: str | None = None,
    ) -> None:
        """`base_hash` is model_hash of the base: checkpoints of another base are then refused."""
        self.config = config
        self.model = model
        self.prompts = tuple(prompts)
        self.held_out = plan_held_out(config, held_out_prompts)
        self.workgroup = workgroup or Workgroup()
        self.base_hash = base_hash
        self.bank = AdapterBank(model.unet, base_hash=base_hash)
        self.parameters = self.bank.add_trainable(config.name, rank=config.rank, seed=config.seed)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=config.learning_rate, weight_decay=WEIGHT_DECAY)
        self.objective = OBJECTIVES[config.objective]
        self.policy = Policy(config, model, self.bank)
        engine = BlendEngine(model, self.bank, max_rows=ENGINE_ROWS, tile_rows=ENGINE_ROWS)
        self.sampler = Sampler(config, engine, reward)
        self.statistics = advantages.PromptStatistics()
        self.value = ValueBaseline(config, model, self.workgroup)
        self.iteration = 0
        self.base: tuple[float, float] | None = None
        self.history: list[Metrics] = []
        self.sheets: dict[str, Tensor] = {}

    # ---- one iteration

    def iterate(self) -> Metrics:
        """Roll out, score and update once; returns the iteration's metrics."""
        if self.base is None:
            raise FinetuneError("the base was not evaluated: call evaluate() before the first iterate()")
        started = time.perf_counter()
        plan = plan_requests(self.config, self.prompts, self.iteration)
        owned = [plan[i] for i in self.workgroup.slice(len(plan))]
        scored = self.sampler.roll_out(owned)
        rewards = self._gather_rewards(scored, plan)
        rolled_out = time.perf_counter()
        path = scored.trajectories[0]
        trainable = self.policy.random_steps(path.timesteps, path.prev_timesteps)
        transitions = Transitions.of(
            scored, [choose_steps(self.config, self.iteration, request.index, trainable) for request in owned]
        )
        text = self.model.encode_prompts([request.prompt for request in owned])
        gains, value_loss = self._advantages(rewards, plan, transitions, text)
        updates = [
            self._update(transitions, text, gains, plan, update) for update in range(self.config.updates_per_iteration)
        ]
        self.iteration += 1
        seconds = time.perf_counter() - started
        first = updates[0]
        metrics: Metrics = {
            "iteration": self.iteration,
            "iterations": self.config.iterations,
            "reward_mean": rewards.mean().item(),
            "reward_std": rewards.std().item(),
            "reward_ci": 1.96 * rewards.std().item() / math.sqrt(len(rewards)),
            # an unbiased estimate from the trained steps: their mean times the number of steps of the path
            "path_kl": sum(update["kl"] for update in updates) / len(updates) * len(trainable),
            "policy_loss": first["loss"],
            "ratio_deviation": first["ratio_deviation"],
            "clipped": sum(update["clipped"] for update in updates) / len(updates),
            "grad_norm": first["grad_norm"],
            "seconds": seconds,
            "rollout_seconds": rolled_out - started,
            "images_per_second": len(plan) / seconds,
        }
        if value_loss is not None:
            metrics["value_loss"] = value_loss
        return metrics

    def _gather_rewards(self, scored: Scored, plan: Sequence[Request]) -> Tensor:
        indices = [request.index for request in scored.requests]
        rewards = self.workgroup.gather(scored.rewards, indices, len(plan))
        bad = [plan[i] for i in (~rewards.isfinite()).nonzero().flatten().tolist()]
        if bad:
            causes = {str(o.error) for o in scored.outputs if o.error is not None}
            raise NonFiniteError(
                f"iteration {self.iteration + 1}: the reward {self.config.reward!r} is NaN or infinite for "
                f"{len(bad)} of {len(plan)} images, first {'; '.join(map(str, bad[:3]))}"
                f"{''.join(f' ({cause})' for cause in sorted(causes))}; lower learning_rate or check the reward"
            )
        return rewards

    def _advantages(
        self, rewards: Tensor, plan: Sequence[Request], transitions: Transitions, text: Conditioning
    ) -> tuple[Tensor, float | None]:
        """Advantages of the local transitions [M], and the value network's loss where it has one."""
        assert self.base is not None
        standardised = advantages.standardise(rewards, *self.base)
        value_loss = None
        if self.objective.baseline == "value":
            targets = standardised.to(self.model.device)[transitions.sample]
            value_loss = self.value.fit(transitions, text, targets, self.iteration)
            gains = targets - self.value.predict(transitions, text)
        else:
            if self.objective.baseline == "group":
                gains = advantages.group_advantages(standardised, torch.tensor([r.group for r in plan]))
            else:
                gains = self.statistics.advantages(standardised, [request.prompt for request in plan])
            gains = gains.to(self.model.device)[transitions.sample]
        return advantages.limit(gains), value_loss

    # ---- one optimiser step

    def _update(
        self, transitions: Transitions, text: Conditioning, gains: Tensor, plan: Sequence[Request], update: int
    ) -> dict[str, float]:
        """One optimiser step over the transitions whose slot falls to this update, in micro-batches."""
        mine = (transitions.slot % self.config.updates_per_iteration == update).nonzero().flatten()
        total = self.workgroup.sum_(transitions.weight[mine].sum().reshape(1).cpu()).item()
        flags = torch.zeros(len(plan), self.config.num_inference_steps)
        sums = torch.zeros(4, dtype=torch.float64)
        self.optimizer.zero_grad(set_to_none=True)
        size = max(1, self.config.micro_batch_rows // self.policy.rows_per_transition)
        for index in mine.split(size):
            part = transitions.select(index)
            loss, kl, deviation, clipped = (
                part.weight * v for v in self._losses(part, text.rows(part.text), gains[index])
            )
            # times D: the gradient of J per step, of a size that Adam's epsilon and grad_clip are made for
            (loss.sum() * part.latents[0].numel() / total).backward()
            flags[part.sample.cpu(), part.step.cpu()] += (~loss.detach().isfinite()).float().cpu()
            sums += torch.stack([v.detach().double().sum().cpu() for v in (loss, kl, deviation, clipped)])
        self.workgroup.sum_gradients(self.parameters)
        self._require_finite(self.workgroup.sum_(flags), plan)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.grad_clip)
        if not norm.isfinite():
            raise NonFiniteError(
                f"iteration {self.iteration + 1}: the gradient norm is {norm.item()} over prompts "
                f"{sorted({r.prompt for r in plan})[:3]}, seeds from {plan[0].seed}; lower learning_rate"
            )
        self.optimizer.step()
        loss_mean, kl_mean, deviation_mean, clipped_mean = (self.workgroup.sum_(sums) / total).tolist()
        return {
            "loss": loss_mean,
            "kl": kl_mean,
            "ratio_deviation": deviation_mean,
            "clipped": clipped_mean,
            "grad_norm": norm.item(),
        }

    def _losses(self, part: Transitions, text: Conditioning, gains: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Per transition [M]: loss, KL in nats, |ratio - 1|, and whether the ratio is clipped."""
        mean, std = self.policy.transition(part, text, mix=1.0)
        log_prob = log_prob_of(part.prev_latents.float(), mean, std)
        # the reference rows need no gradient: without a graph they cost a third
        with torch.no_grad():
            base_mean, _ = self.policy.transition(part, text, mix=0.0)
        kl = transition_kl(mean, base_mean, std)
        gains = gains * (std >= REWARDED_STD)
        if self.config.rewarded_steps:
            gains = gains * (part.step < self.config.rewarded_steps)
        policy_loss = self.objective.policy_loss(log_prob, part.log_probs, gains, self.config.clip_range)
        deviation = (torch.exp(log_prob - part.log_probs) - 1).abs()
        elements = mean[0].numel()
        return (
            regularised_loss(policy_loss, kl, self.config.kl_weight),
            kl * elements,
            deviation,
            (deviation > self.config.clip_range).float(),
        )

    def _require_finite(self, flags: Tensor, plan: Sequence[Request]) -> None:
        bad = flags.nonzero().tolist()
        if bad:
            sample, step = bad[0]
            raise NonFiniteError(
                f"iteration {self.iteration + 1}: the loss is NaN or infinite at {len(bad)} transitions, "
                f"first step {step} of {plan[sample]}; lower learning_rate or raise kl_weight"
            )

    # ---- held-out evaluation

    def evaluate(self) -> Metrics:
        """Mean reward and path KL (nats) on the fixed held-out images; the first call measures the base."""
        owned = [self.held_out[i] for i in self.workgroup.slice(len(self.held_out))]
        scored = self.sampler.evaluate(owned)
        rewards = self._gather_rewards(scored, self.held_out)
        indices = [request.index for request in owned]
        elements = math.prod(self.model.latents_shape(self.model.default_height, self.model.default_width))
        nats = torch.tensor([elements * (output.path_kl or 0.0) for output in scored.outputs])
        path_kl = self.workgroup.gather(nats, indices, len(self.held_out)).mean().item()
        mean, std = rewards.mean().item(), rewards.std().item()
        sheet = (scored.images[:SHEET_IMAGES] * 255).round().to(torch.uint8)
        self.sheets["tuned"] = sheet
        if self.base is None:
            self.base = (mean, std)
            self.sheets["base"] = sheet
        return {
            "held_out_mean": mean,
            "held_out_std": std,
            "held_out_ci": 1.96 * std / math.sqrt(len(rewards)),
            "held_out_path_kl": path_kl,
        }

    # ---- state

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs, as tensors and plain values; keyed randomness has no state."""
        return {
            "settings": {**self.config.training_facts(), "base_hash": self.base_hash},
            "iteration": self.iteration,
            "parameters": [parameter.detach().cpu().clone() for parameter in self.parameters],
            "optimizer": self.optimizer.state_dict(),
            "value": self.value.state_dict(),
            "statistics": self.statistics.state_dict(),
            "base": self.base,
            "history": self.history,
            "sheets": self.sheets,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from state_dict(); ResumeError names the settings that differ."""
        require_resumable(self.config, state["settings"], self.base_hash)
        with torch.no_grad():
            for parameter, saved in zip(self.parameters, state["parameters"], strict=True):
                parameter.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])
        self.value.load_state_dict(state["value"])
        self.statistics.load_state_dict(state["statistics"])
        self.iteration = state["iteration"]
        self.base = tuple(state["base"]) if state["base"] is not None else None
        self.history = list(state["history"])
        self.sheets = dict(state["sheets"])
