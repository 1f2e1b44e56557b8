"""What an evaluation run is: one TOML file, checked before any work starts."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from blend.preference import METHODS
from blend.rewards import require_known
from workers.evaluation.rivals import parse_rival

SPRITES_TEST = "sprites-test"
# Settings of a training that an oracle's preference and bundle decide.
FILLED_IN = {"name", "base_model", "reward", "kl_weight"}


class EvaluationError(ValueError):
    """An evaluation that cannot start or go on; `key` names the entry of the run file at fault, if one is."""

    def __init__(self, message: str, key: str | None = None) -> None:
        super().__init__(message)
        self.key = key

    def __reduce__(self) -> tuple[type, tuple[str, str | None]]:
        return type(self), (str(self), self.key)


def _counted(value: Any) -> Any:
    """`seeds = 4` is short for [0, 1, 2, 3]."""
    if isinstance(value, int) and not isinstance(value, bool):
        return tuple(range(value))
    return _rows(value)


def _rows(value: Any) -> Any:
    """A pandas Series stands for its values, a DataFrame for its rows as dictionaries."""
    if hasattr(value, "to_dict") and hasattr(value, "columns"):
        return tuple(value.to_dict("records"))
    return tuple(value.tolist()) if hasattr(value, "tolist") else value


class EvaluateConfig(BaseModel):
    """A grid of preferences x methods, and the prompts, seeds and rewards to score it by.

    Prompts and seeds may be pandas Series, and weights a DataFrame with a column per adapter.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    # Registry reference of the bundle: name, name@version or name@alias.
    bundle: str = "sprites@champion"
    # Held-out prompts: a list, the path of a text file with one per line, or "sprites-test".
    prompts: Annotated[tuple[str, ...] | str, BeforeValidator(_rows)] = SPRITES_TEST
    # Use only the first so many prompts; None: all of them, or 24 of "sprites-test".
    num_prompts: int | None = Field(None, ge=1)
    # Seeds, the same for every prompt and method; a number n stands for 0 .. n-1.
    seeds: Annotated[tuple[int, ...], BeforeValidator(_counted)] = (0, 1, 2, 3)
    # Rewards to score by, built in or plugins, on top of those the bundle's adapters were tuned for.
    rewards: tuple[str, ...] = ()
    # Ways of blending to compare. Base and single adapters are always measured.
    methods: tuple[str, ...] = ("mpa", "staged", "ls", "soup")
    # Preferences to blend at, {adapter: weight} each, on top of pair_weights and simplex_steps.
    weights: Annotated[tuple[dict[str, float], ...], BeforeValidator(_rows)] = ()
    # For each pair of adapters: the weight of the first; the second takes the rest.
    pair_weights: tuple[float, ...] = (0.2, 0.5, 0.8)
    # All weightings of all adapters in steps of 1/n; 0 for none.
    simplex_steps: int = Field(0, ge=0, le=20)
    # Equal weights of all adapters, too.
    equal_weights: bool = True
    # Strengths of the KL dial: 0 is the base, 1 the tuned model, above 1 extrapolates (mpa and soup only).
    kl_lambdas: tuple[float, ...] = (1.0,)
    # Methods measured at the strengths other than 1 ...
    kl_methods: tuple[str, ...] = ("mpa",)
    # ... and whether at every preference (true) or at equal weights and single adapters only.
    kl_everywhere: bool = False
    # Rivals to measure beside the blends: best_of_N, code_N_B, rgg_S, switch, composite, with numbers for the letters.
    rivals: tuple[str, ...] = ()
    # Where: at the preferences of oracle_weights (false), or, as where there are none, at every mix (true).
    rivals_everywhere: bool = False
    # Preferences to retrain a model for, {adapter: weight} each: the oracles, which the blend stands in for ...
    oracle_weights: Annotated[tuple[dict[str, float], ...], BeforeValidator(_rows)] = ()
    # ... and adapters to retrain at other strengths, {adapter: [lambda, ...]}: at kl_weight / lambda, and to lambda^2
    # of the path KL of the adapter where oracle_run has a kl_target.
    oracle_lambdas: dict[str, tuple[float, ...]] = {}
    # Run file that oracles are trained by: name, reward, base and kl_weight are filled in. Needed for those that the
    # registry does not have yet.
    oracle_run: str | None = None
    # Its settings to train by other values of, e.g. { seed = 1 } for how far retraining itself varies.
    oracle_settings: dict[str, Any] = {}
    # Ask the sprites judge whether colours and objects are those of the prompt. It is nobody's reward.
    judge: bool = False
    # Sampler steps and guidance; None: the bundle's own defaults.
    num_inference_steps: int | None = Field(None, ge=1, le=1000)
    guidance_scale: float | None = Field(None, ge=0, le=50)
    # Noise of the sampler, from 0 (deterministic) to 1; method ls needs more than 0.
    eta: float = Field(1.0, ge=0, le=1)
    # Size of the images in pixels; None: the bundle's, or else the model's own.
    height: int | None = Field(None, ge=8)
    width: int | None = Field(None, ge=8)
    # Measure the path KL to the base as well; costs the base's rows where the blend does not use them.
    path_kl: bool = False
    # Ray actors, each with its own copy of the bundle; 0 works in this process.
    num_workers: int = Field(2, ge=0, le=1024)
    # Share of a GPU for each actor; 0 works on the CPU.
    gpus_per_worker: float = Field(0.0, ge=0, le=8)
    # Ray actors that score for all workers, for rewards that are models; 0 scores in each worker ...
    reward_actors: int = Field(0, ge=0, le=1024)
    # ... and the share of a GPU for each of them.
    reward_gpus: float = Field(0.0, ge=0, le=8)
    # Images generated together; seeds of one prompt are never split.
    batch_size: int = Field(16, ge=1, le=4096)
    # Bootstrap resamples over prompts, their seed, and the coverage of the intervals.
    resamples: int = Field(2000, ge=100, le=100_000)
    bootstrap_seed: int = 0
    confidence: float = Field(0.95, gt=0.5, lt=1)
    # Hypervolumes count from this many base standard deviations below the base mean, in each reward.
    reference_sds: float = Field(2.0, gt=0, le=10)
    # Prompts (columns) shown in the image grid.
    picture_prompts: int = Field(6, ge=1, le=12)

    @field_validator("methods", "kl_methods")
    @classmethod
    def _known_methods(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return _known("method", value, METHODS)

    @field_validator("rivals")
    @classmethod
    def _known_rivals(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            parse_rival(name)
        return tuple(dict.fromkeys(value))

    @field_validator("oracle_lambdas")
    @classmethod
    def _positive(cls, value: dict[str, tuple[float, ...]]) -> dict[str, tuple[float, ...]]:
        if any(not 0 < strength <= 10 or strength == 1 for strengths in value.values() for strength in strengths):
            raise ValueError("strengths must lie in (0, 10] and not be 1, which is the adapter itself")
        return value

    @field_validator("oracle_settings")
    @classmethod
    def _not_filled_in(cls, value: dict[str, Any]) -> dict[str, Any]:
        if taken := sorted(FILLED_IN & value.keys()):
            raise ValueError(f"{taken[0]} is that of each oracle: give other settings of a training")
        return value

    @field_validator("rewards")
    @classmethod
    def _known_rewards(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            require_known(name)
        return tuple(dict.fromkeys(value))

    @field_validator("seeds")
    @classmethod
    def _some_seeds(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not value or len(set(value)) < len(value) or min(value) < 0:
            raise ValueError(f"seeds {list(value)} must be one or more different numbers from 0")
        return value

    @field_validator("pair_weights")
    @classmethod
    def _inside(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if any(not 0 <= weight <= 1 for weight in value):
            raise ValueError(f"{list(value)} must all lie in [0, 1]")
        return value

    @model_validator(mode="after")
    def _actors_need_ray(self) -> Self:
        if self.reward_actors and not self.num_workers:
            raise ValueError(f"reward_actors is {self.reward_actors} and num_workers 0: actors need Ray, use 1 or more")
        return self

    @classmethod
    def parse(cls, data: dict[str, Any], source: str = "run") -> Self:
        """Check a mapping; EvaluationError names the first wrong key, what it holds and what it may hold."""
        try:
            return cls(**data)
        except ValidationError as error:
            raise _explain(error, source, tuple(cls.model_fields)) from None

    @classmethod
    def from_toml(cls, path: str | Path) -> Self:
        """Read a run file; relative paths in it are taken from the run file's directory."""
        source = Path(path)
        try:
            data = tomllib.loads(source.read_text())
        except FileNotFoundError:
            raise EvaluationError(f"no run file at {source}; infra/runs/ has examples") from None
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise EvaluationError(f"{source} is no readable TOML file: {error}") from None
        prompts = data.get("prompts")
        if isinstance(prompts, str) and prompts != SPRITES_TEST:
            data["prompts"] = str((source.parent / prompts).resolve())
        if isinstance(data.get("oracle_run"), str):
            data["oracle_run"] = str((source.parent / data["oracle_run"]).resolve())
        return cls.parse(data, str(source))

    def read_prompts(self) -> tuple[str, ...]:
        """The prompts themselves; EvaluationError when the file or the list has none."""
        if isinstance(self.prompts, tuple):
            prompts = self.prompts
        elif self.prompts == SPRITES_TEST:
            from blend.sprites.captions import held_out_prompts

            prompts = tuple(held_out_prompts(self.num_prompts or 24))
        else:
            prompts = _read_lines(Path(self.prompts))
        if not prompts or any(not prompt.strip() for prompt in prompts):
            raise EvaluationError("prompts: give at least one prompt, none of them empty", "prompts")
        if len(set(prompts)) < len(prompts):
            raise EvaluationError("prompts: each prompt may be listed once; ask for more seeds instead", "prompts")
        return prompts[: self.num_prompts]


def _known(kind: str, names: tuple[str, ...], allowed: tuple[str, ...]) -> tuple[str, ...]:
    unknown = [name for name in names if name not in allowed]
    if unknown:
        raise ValueError(f"unknown {kind} {unknown[0]!r}; choose from {', '.join(allowed)}")
    return tuple(dict.fromkeys(names))


def _read_lines(path: Path) -> tuple[str, ...]:
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(
            f"prompts: {path} cannot be read ({error}); give a list, a text file or {SPRITES_TEST!r}",
            "prompts",
        ) from None
    return tuple(line.strip() for line in lines if line.strip())


def _explain(error: ValidationError, source: str, fields: tuple[str, ...]) -> EvaluationError:
    first = error.errors()[0]
    key = str(first["loc"][0]) if first["loc"] else None
    if first["type"] == "extra_forbidden":
        return EvaluationError(f"{source}: unknown key {key!r}; known keys: {', '.join(fields)}", key)
    message = first["msg"].removeprefix("Value error, ")
    if key is None:
        return EvaluationError(f"{source}: {message}", message.partition(" ")[0])
    return EvaluationError(f"{source}: {key} = {first['input']!r}: {message}", key)
