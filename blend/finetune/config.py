"""TrainConfig: one TOML file describes one fine-tuning run."""

import hashlib
import json
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from blend.finetune.errors import ConfigError, ResumeError
from blend.finetune.objectives import OBJECTIVES

PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
PositiveInt = Annotated[int, Field(ge=1)]
# keys that may change between a run and its resumption: they do not alter what one iteration computes
RESUMABLE_KEYS = frozenset(
    {"iterations", "eval_every", "checkpoint_every", "num_workers", "use_gpu", "reward_actors", "reward_gpus"}
)


class Guard(BaseModel):
    """When a run ends before its last iteration: each rule is looked at after every held-out evaluation.

    What is published is then the adapter of the last evaluation that broke no rule.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    # most path KL to the base on the held-out images, in nats
    kl: PositiveFloat | None = None
    # most that the held-out reward may fall below its best, in standard deviations of the base
    drop: PositiveFloat | None = None
    # rewards that are not trained, such as { alignment = 1.0 }: most that each may fall below the base, in its own
    # standard deviations under the base; all are reported
    watch: dict[str, PositiveFloat] = {}


class TrainConfig(BaseModel):
    """Settings of one adapter's training; frozen, and unknown keys are errors that name the key."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    # name of the basis adapter, also its registry name
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,62}$")]
    # "sprites", a directory in diffusers layout, or a Hub id
    base_model: str = "sprites"
    # a name that blend.rewards.load_reward knows, or a mix of them: { colourfulness = 0.5, brightness = 0.5 } is
    # sum_i w_i (r_i - mean_i) / std_i, in the base's means and standard deviations, at the same alpha
    reward: str | dict[str, PositiveFloat]
    # training prompts: a list, "sprites-train", or the path of a text file with a prompt per line
    prompts: tuple[str, ...] | str = "sprites-train"
    # prompts of the held-out evaluation, never trained on: a list, "sprites-test", or a path
    held_out_prompts: tuple[str, ...] | str = "sprites-test"
    # images of the held-out evaluation, and how many of them share a prompt: diversity is measured within a prompt
    held_out_images: Annotated[int, Field(ge=2)] = 64
    held_out_images_per_prompt: PositiveInt = 2
    # how advantages and the policy loss are formed: see blend.finetune.objectives
    objective: Literal["dpok", "ddpo", "grpo"] = "grpo"
    # rank of the LoRA on the attention projections (alpha = rank, so that the scale is 1)
    rank: PositiveInt = 4
    # AdamW on the adapter
    learning_rate: PositiveFloat = 2e-3
    # alpha of: mean reward / (its std under the base) - alpha * path KL in nats; 0 turns the KL off
    kl_weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.01
    # path KL on the held-out images, in nats, that is not to be passed: alpha rises above kl_weight as far as it takes
    kl_target: PositiveFloat | None = None
    # when to stop early
    guard: Guard = Guard()
    # which adapter is published at the end: the last, or of those evaluated and within kl_target (a tenth above it is
    # forgiven: alpha holds the KL near it, not on it) the one whose held-out reward is highest
    keep: Literal["last", "best"] = "last"
    # the ratio of mean-per-element probabilities is clipped to 1 +- this
    clip_range: PositiveFloat = 1e-4
    # largest gradient norm over all adapter parameters
    grad_clip: PositiveFloat = 1.0
    # outer loops: roll out, score, update
    iterations: PositiveInt = 36
    # distinct prompts of one iteration, over all workers
    prompts_per_iteration: PositiveInt = 8
    # images per prompt: the group whose mean is the baseline of ddpo and grpo
    images_per_prompt: PositiveInt = 8
    # optimiser steps per iteration; each takes its own share of the trained steps
    updates_per_iteration: PositiveInt = 1
    # DDIM steps of a rollout
    num_inference_steps: Annotated[int, Field(ge=2, le=1000)] = 20
    # denoising steps of each trajectory that are trained, drawn at random
    train_steps_per_sample: PositiveInt = 10
    # those steps anywhere on the path, or one window of neighbouring steps that begins anywhere
    step_choice: Literal["random", "window"] = "random"
    # the first so many steps of a path carry the reward and are all trained; the others count in the KL alone, a
    # random few of them per sample. 0 is all steps. What a reward sees of a layout is decided in the first steps.
    rewarded_steps: Annotated[int, Field(ge=0)] = 0
    # classifier-free guidance of rollouts and of the policy; 1 is off and halves the cost
    guidance_scale: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.0
    # guidance of the held-out evaluation: what the adapter is served with
    eval_guidance_scale: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 3.0
    # DDIM noise: the policy is Gaussian only for eta > 0
    eta: Annotated[float, Field(gt=0, le=1)] = 1.0
    # most UNet rows of one training forward: bounds memory. Rollouts, which keep no activations, run four times as many
    micro_batch_rows: Annotated[int, Field(ge=2)] = 64
    # recompute activations in the backward pass: less memory, a forward more
    gradient_checkpointing: bool = False
    # held-out evaluation every so many iterations (always before the first and after the last)
    eval_every: PositiveInt = 10
    # checkpoint every so many iterations (always after the last)
    checkpoint_every: PositiveInt = 1
    # everything random follows from it, whatever the number of workers
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    # Ray Train workers, each with one CPU or one GPU; 0 runs in this process without Ray
    num_workers: Annotated[int, Field(ge=0)] = 1
    # one GPU per worker (nccl) instead of one CPU (gloo)
    use_gpu: bool = False
    # Ray actors that score images while the workers sample, for rewards that are models; 0 scores in each worker
    reward_actors: Annotated[int, Field(ge=0)] = 0
    # GPUs of each reward actor; a share such as 0.5 is allowed
    reward_gpus: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    # precision of the frozen model; adapter parameters are always float32
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.train_steps_per_sample > self.num_inference_steps:
            raise ValueError(
                f"train_steps_per_sample is {self.train_steps_per_sample}: at most num_inference_steps "
                f"({self.num_inference_steps})"
            )
        if self.rewarded_steps >= self.train_steps_per_sample:
            raise ValueError(
                f"rewarded_steps is {self.rewarded_steps}: fewer than train_steps_per_sample "
                f"({self.train_steps_per_sample}), so that later steps are trained too and count in the KL"
            )
        # the last step of a path adds no noise: it has no gradient
        steps = min(self.train_steps_per_sample, self.num_inference_steps - 1)
        if self.updates_per_iteration > steps:
            raise ValueError(
                f"updates_per_iteration is {self.updates_per_iteration}: at most the {steps} trained steps that have "
                "a gradient, because each update takes its own share of them"
            )
        if OBJECTIVES[self.objective].needs_groups and self.images_per_prompt < 2:
            raise ValueError(
                f"images_per_prompt is {self.images_per_prompt}: {self.objective!r} compares images of "
                "one prompt; use 2 or more, or objective 'dpok'"
            )
        if self.kl_target is not None and self.kl_weight == 0:
            raise ValueError(
                f"kl_target is {self.kl_target:g} and kl_weight 0: alpha rises from kl_weight by factors, give it a "
                "small number such as 0.001"
            )
        if not self.reward:
            raise ValueError("reward is an empty mix: give at least one reward a weight")
        for name in self.rewards:
            if name in self.guard.watch:
                raise ValueError(f"guard.watch names {name!r}, the trained reward: use guard.drop for it")
        if self.reward_actors and not self.num_workers:
            raise ValueError(f"reward_actors is {self.reward_actors} and num_workers 0: actors need Ray, use 1 or more")
        if self.num_workers > self.batch_size:
            raise ValueError(f"num_workers is {self.num_workers}: more than the {self.batch_size} images")
        if self.num_workers > (groups := -(-self.held_out_images // self.held_out_images_per_prompt)):
            raise ValueError(
                f"num_workers is {self.num_workers}: each evaluates whole prompts, of which held_out_images "
                f"({self.held_out_images}) has {groups}; raise it"
            )
        return self

    @property
    def rewards(self) -> dict[str, float]:
        """The weight of every reward that is trained on."""
        return {self.reward: 1.0} if isinstance(self.reward, str) else dict(self.reward)

    @property
    def reward_label(self) -> str:
        """What is trained on, in words: `colourfulness`, or `0.5 colourfulness + 0.5 brightness`."""
        if isinstance(self.reward, str):
            return self.reward
        return " + ".join(f"{weight:g} {name}" for name, weight in self.reward.items())

    @property
    def batch_size(self) -> int:
        """Images of one iteration over all workers."""
        return self.prompts_per_iteration * self.images_per_prompt

    @property
    def digest(self) -> str:
        """First 16 hex digits of the sha256 of everything that decides what is trained and for how long."""
        facts = {**self.training_facts(), "iterations": self.iterations}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    def training_facts(self) -> dict[str, Any]:
        """The settings that must be equal for a checkpoint of one run to be continued by another."""
        # where evaluations steer the run, their frequency decides its result
        steered = self.kl_target is not None or self.guard != Guard()
        free = RESUMABLE_KEYS - {"eval_every"} if steered else RESUMABLE_KEYS
        return {k: v for k, v in self.model_dump(mode="json").items() if k not in free}

    @classmethod
    def parse(cls, settings: dict[str, Any], *, source: str = "run") -> Self:
        """Validate settings; ConfigError names the source and every offending key."""
        try:
            return cls.model_validate(settings)
        except ValidationError as error:
            raise ConfigError(f"{source}: {_describe(error, tuple(cls.model_fields))}") from None

    @classmethod
    def from_toml(cls, path: str | Path) -> Self:
        """Read a run file; relative paths inside it are taken from its own directory."""
        path = Path(path)
        try:
            settings = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read ({error.strerror}); give the path of a run file") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: not a TOML file ({error})") from None
        for key in ("prompts", "held_out_prompts", "base_model"):
            value = settings.get(key)
            if isinstance(value, str) and (beside := path.parent / value).exists():
                settings[key] = str(beside.resolve())
        return cls.parse(settings, source=str(path))


def require_resumable(config: TrainConfig, facts: dict[str, Any], base_hash: str | None) -> None:
    """Raise ResumeError that names the keys in which a checkpoint's settings differ from these."""
    mine = {**config.training_facts(), "base_hash": base_hash}
    keys = sorted(set(mine) | set(facts))
    differing = [f"{k}: {facts.get(k)!r} -> {mine.get(k)!r}" for k in keys if facts.get(k) != mine.get(k)]
    if differing:
        raise ResumeError(
            f"the checkpoint of {config.name!r} was made with other settings ({'; '.join(differing)}): "
            "use them again, or train into another directory"
        )


def _describe(error: ValidationError, known: tuple[str, ...]) -> str:
    lines = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"] if not str(part).startswith(("tuple[", "str")))
        if item["type"] == "extra_forbidden":
            lines.append(f"unknown key {key!r} (known: {', '.join(known)})")
        elif item["type"] == "missing":
            lines.append(f"{key} is missing: add it")
        elif not key:
            lines.append(item["msg"].removeprefix("Value error, "))
        else:
            lines.append(f"{key} is {item['input']!r}: {item['msg'].removeprefix('Value error, ')}")
    return "; ".join(dict.fromkeys(lines))
