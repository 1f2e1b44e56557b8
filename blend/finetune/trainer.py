"""Trainer: policy-gradient fine-tuning of one adapter, one iteration at a time. Knows no files, no Ray."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from blend.adapters import AdapterBank, AdapterError
from blend.conditioning import Conditioning
from blend.engine import BlendEngine
from blend.finetune import advantages
from blend.finetune.config import TrainConfig, require_resumable
from blend.finetune.errors import ConfigError, FinetuneError, NonFiniteError
from blend.finetune.held_out import Metrics, best_within, broken_rule, owned_requests, sheet_row, summarise
from blend.finetune.kl_control import KLControl
from blend.finetune.objectives import OBJECTIVES
from blend.finetune.policy import Policy, Transitions
from blend.finetune.rollout import Request, Sampler, Scored, choose_steps, plan_held_out, plan_requests
from blend.finetune.update import Batch, PolicyUpdate
from blend.finetune.value import ValueBaseline
from blend.finetune.workgroup import Workgroup
from blend.model import DiffusionModel
from blend.rewards import Reward
from blend.rewards.weighted import WeightedReward

MOST_TILE_ROWS = 64


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
        watched: Mapping[str, Reward] | None = None,
    ) -> None:
        """`base_hash` is model_hash of the base: checkpoints of another base are then refused.

        watched: the rewards of guard.watch, which the held-out evaluation measures beside the trained one.
        """
        self.config = config
        self.model = model
        self.prompts = tuple(prompts)
        self.held_out = plan_held_out(config, held_out_prompts)
        self.workgroup = workgroup or Workgroup()
        self.base_hash = base_hash
        self.bank = AdapterBank(model.unet, base_hash=base_hash)
        try:
            self.parameters = self.bank.add_trainable(config.name, rank=config.rank, seed=config.seed)
        except AdapterError as error:
            raise ConfigError(f"base_model is {config.base_model!r}, which cannot be tuned: {error}") from error
        self.objective = OBJECTIVES[config.objective]
        self.policy = Policy(config, model, self.bank)
        self.update = PolicyUpdate(config, self.policy, self.parameters, self.workgroup)
        tile_rows = min(MOST_TILE_ROWS, 4 * config.micro_batch_rows)
        # at their peak samples run the base beside the adapter: twice a tile's rows are a tile at the other steps
        engine = BlendEngine(model, self.bank, max_rows=2 * tile_rows, tile_rows=tile_rows)
        self.should_stop: Callable[[], bool] = lambda: False  # asked between engine steps and between micro-batches
        self.sampler = Sampler(config, engine, reward, watched or {})
        self.sampler.should_stop = lambda: self.should_stop()
        if config.gradient_checkpointing:
            model.unet.enable_gradient_checkpointing()  # type: ignore[operator]
        self.control = KLControl(config.kl_weight, config.kl_target)
        self.statistics = advantages.PromptStatistics()
        self.value = ValueBaseline(config, model, self.workgroup)
        self.iteration = 0
        self.base: tuple[float, float] | None = None
        self.scales: dict[str, tuple[float, float]] = {}  # of a mix: mean and std of each reward under the base
        self.history: list[Metrics] = []
        self.sheets: dict[int, Tensor] = {}
        self.finished = False  # stopped early, by the guard
        self._kept: tuple[int, list[Tensor]] = (0, [])  # iteration and parameters to go back to

    # ---- one iteration

    def iterate(self) -> Metrics:
        """Roll out, score and update once; returns the iteration's metrics."""
        if self.base is None:
            raise FinetuneError("the base was not evaluated: call evaluate() before the first iterate()")
        with self._naming_memory():
            return self._iterate()

    def _iterate(self) -> Metrics:
        started = time.perf_counter()
        plan = plan_requests(self.config, self.prompts, self.iteration)
        owned = [plan[i] for i in self.workgroup.slice(len(plan))]
        trainable = self.policy.random_steps()
        steps = [choose_steps(self.config, self.iteration, request.index, trainable) for request in owned]
        scored = self.sampler.roll_out(owned, steps)
        rewards = self._gather_rewards(scored.rewards, scored, plan)
        rolled_out = time.perf_counter()
        transitions = Transitions.of(scored, steps)
        path_kl = self._path_kl(transitions, len(plan))
        kl_weight = self.control.step(path_kl)
        text = self.model.encode_prompts([request.prompt for request in owned])
        gains, value_loss = self._advantages(rewards, plan, transitions, text)
        batch = Batch(self.iteration, plan, transitions, text, gains, kl_weight)
        updates = [self.update.run(batch, part, self.should_stop) for part in range(self.config.updates_per_iteration)]
        self.iteration += 1
        seconds = time.perf_counter() - started
        first = updates[0]
        metrics: Metrics = {
            "iteration": self.iteration,
            "iterations": self.config.iterations,
            "reward_mean": rewards.mean().item(),
            "reward_std": rewards.std().item(),
            "reward_ci": 1.96 * rewards.std().item() / math.sqrt(len(rewards)),
            "path_kl": path_kl,
            "kl_weight": kl_weight,
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

    @contextmanager
    def _naming_memory(self) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise FinetuneError(
                f"iteration {self.iteration + 1}: {self.model.device} has too little memory with micro_batch_rows "
                f"{self.config.micro_batch_rows}: lower it, set gradient_checkpointing, or dtype to bfloat16 ({error})"
            ) from error

    def _path_kl(self, transitions: Transitions, paths: int) -> float:
        """Path KL of the rollouts in nats, an unbiased estimate: each trained step stands for `weight` of them."""
        nats = (transitions.weight.double() * transitions.kl.double()).sum().reshape(1).cpu()
        return (self.workgroup.sum_(nats) * transitions.latents[0].numel() / paths).item()

    def _gather_rewards(self, values: Tensor, scored: Scored, plan: Sequence[Request]) -> Tensor:
        """All workers' values [N]; NonFiniteError where one is no number."""
        indices = [request.index for request in scored.requests]
        rewards = self.workgroup.gather(values, indices, len(plan))
        bad = [plan[i] for i in (~rewards.isfinite()).nonzero().flatten().tolist()]
        if bad:
            causes = {str(o.error) for o in scored.outputs if o.error is not None}
            raise NonFiniteError(
                f"iteration {self.iteration + 1}: the reward {self.config.reward_label!r} is NaN or infinite for "
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

    # ---- held-out evaluation

    def evaluate(self) -> Metrics:
        """Rewards, path KL (nats) and diversity on the fixed held-out images; the first call measures the base."""
        owned = owned_requests(self.held_out, self.workgroup)
        with self._naming_memory():
            scored = self.sampler.evaluate(owned)
        watched = {name: self._gather_rewards(values, scored, self.held_out) for name, values in scored.watched.items()}
        if self.base is None and isinstance(self.sampler.reward, WeightedReward):
            rewards = self._scale_mix(self.sampler.reward, watched)
        else:
            rewards = self._gather_rewards(scored.rewards, scored, self.held_out)
        elements = math.prod(self.model.latents_shape(self.model.default_height, self.model.default_width))
        nats = torch.tensor([elements * (output.path_kl or 0.0) for output in scored.outputs])
        path_kl = self.workgroup.gather(nats, [request.index for request in owned], len(self.held_out))
        self.sheets[self.iteration] = sheet_row(scored)
        metrics = summarise(rewards, watched, path_kl, scored, self.held_out, self.workgroup)
        if self.base is None:
            self.base = (0.0, 1.0) if self.scales else (metrics["held_out_mean"], metrics["held_out_std"])
        else:
            self.control.observe_held_out(metrics["held_out_path_kl"])
        return metrics

    def _scale_mix(self, mix: WeightedReward, values: Mapping[str, Tensor]) -> Tensor:
        """Give the mix the base's scales, from the base's scores [N] by reward; returns its own scores of them."""
        self.scales = {
            name: (values[name].mean().item(), max(values[name].std().item(), advantages.EPSILON))
            for name in mix.rewards
        }
        self.sampler.reward = scaled = mix.rescaled(self.scales)
        return scaled.combine(values)

    def guard(self) -> Metrics:
        """Look at the latest evaluation in `history`: keep what is to be published, go back to it at the end.

        Returns what the history's last line has to add; `finished` is set when training must not go on.
        """
        reason = broken_rule(self.config.guard, self.history)
        if reason is None:
            best = best_within(self.history, self.config.kl_target)
            if self.config.keep == "last" or best == self.iteration:
                self._kept = (self.iteration, [parameter.detach().clone() for parameter in self.parameters])
            if self.iteration < self.config.iterations or self._kept[0] in (0, self.iteration):
                return {}
        iteration, kept = self._kept
        if not iteration:
            raise FinetuneError(
                f"{self.config.name!r} broke a rule at its first evaluation, in iteration {self.iteration} ({reason}): "
                "lower learning_rate or eval_every, or widen the rule"
            )
        with torch.no_grad():
            for parameter, value in zip(self.parameters, kept, strict=True):
                parameter.copy_(value)
        if reason is None:
            return {"kept_iteration": iteration}
        self.finished = True
        return {"stopped": reason, "kept_iteration": iteration}

    # ---- state

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs, as tensors and plain values; keyed randomness has no state."""
        return {
            "settings": {**self.config.training_facts(), "base_hash": self.base_hash},
            "iteration": self.iteration,
            "parameters": [parameter.detach().cpu().clone() for parameter in self.parameters],
            "optimizer": self.update.optimizer.state_dict(),
            "value": self.value.state_dict(),
            "statistics": self.statistics.state_dict(),
            "control": self.control.state_dict(),
            "finished": self.finished,
            "kept": {"iteration": self._kept[0], "parameters": [value.cpu() for value in self._kept[1]]},
            "base": self.base,
            "scales": self.scales,
            "history": self.history,
            "sheets": self.sheets,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from state_dict(); ResumeError names the settings that differ."""
        require_resumable(self.config, state["settings"], self.base_hash)
        with torch.no_grad():
            for parameter, saved in zip(self.parameters, state["parameters"], strict=True):
                parameter.copy_(saved)
        self.update.optimizer.load_state_dict(state["optimizer"])
        self.value.load_state_dict(state["value"])
        self.statistics.load_state_dict(state["statistics"])
        self.control.load_state_dict(state["control"])
        self.finished = state["finished"]
        kept = state["kept"]
        self._kept = (kept["iteration"], [value.to(self.model.device) for value in kept["parameters"]])
        self.iteration = state["iteration"]
        self.base = tuple(state["base"]) if state["base"] is not None else None
        self.scales = {name: tuple(scale) for name, scale in state.get("scales", {}).items()}
        if self.scales and isinstance(self.sampler.reward, WeightedReward):
            self.sampler.reward = self.sampler.reward.rescaled(self.scales)
        self.history = list(state["history"])
        self.sheets = dict(state["sheets"])
