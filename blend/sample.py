"""One sample as it is asked for, and what may be asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real

from blend.mixing import LS_KINDS
from blend.preference import Preference
from blend.solvers import SOLVERS


class SampleError(ValueError):
    """A sample that cannot be denoised; `param` names the field."""

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param

    def __reduce__(self) -> tuple[type[SampleError], tuple[str, str]]:
        return type(self), (str(self), self.param)


@dataclass(frozen=True, slots=True)
class Sample:
    """One image to denoise."""

    prompt: str
    preference: Preference
    seed: int  # in [0, 2^63)
    negative_prompt: str = ""  # "" is none: where an SDXL model says so, zeros in place of an encoded ""
    num_inference_steps: int = 20
    guidance_scale: float = 3.0  # finite, >= 0; 1 is no guidance
    eta: float = 1.0  # in [0, 1]: 0 deterministic, 1 ancestral; method "ls" needs more than 0
    solver: str = "ddim"  # or "dpmpp", DPM-Solver++(2M): fewer steps for the same image; any eta
    height: int | None = None  # pixels; None: the model's own
    width: int | None = None
    record: bool = False  # fill Output.trajectory
    reference_steps: tuple[int, ...] = ()  # steps at which the trajectory takes down the base's transition too
    measure_kl: bool | None = None  # fill Output.path_kl, at the price of base rows; None: as record
    guidance_interval: tuple[float, float] = (0.0, 1.0)  # shares of the steps between which guidance acts
    shared_unconditional: bool = False  # one unconditional row, of the merged adapters, in place of one per source
    # method "ls": or "systematic", or "iid", the paper's independent draws, or the adapter of every step by name
    ls_schedule: str | tuple[str, ...] = "mirrored"
    refresh_every: int = 5  # method "cached": steps between evaluations of the whole blend
    row_budget: float = 1.0  # method "staged": UNet rows as a multiple of one model's


def check_sample(sample: Sample) -> None:
    """Raise SampleError for what no model could denoise."""
    for name in ("prompt", "negative_prompt"):
        if not isinstance(getattr(sample, name), str):
            raise SampleError(f"{name} is {getattr(sample, name)!r}: use a string", name)
    if isinstance(sample.seed, bool) or not isinstance(sample.seed, int) or not 0 <= sample.seed < 2**63:
        raise SampleError(f"seed is {sample.seed!r}: use an integer from 0 to 2^63 - 1", "seed")
    for name in ("guidance_scale", "eta", "row_budget"):
        value = getattr(sample, name)
        if isinstance(value, bool) or not isinstance(value, Real):
            raise SampleError(f"{name} is {value!r}: use a number", name)
    if not (math.isfinite(sample.guidance_scale) and sample.guidance_scale >= 0):
        raise SampleError(
            f"guidance_scale is {sample.guidance_scale}: use a finite number >= 0 (1 is no guidance)", "guidance_scale"
        )
    if not 0 <= sample.eta <= 1:
        raise SampleError(f"eta is {sample.eta}: use a number from 0 to 1", "eta")
    if sample.preference.method == "ls" and sample.eta == 0 and isinstance(sample.ls_schedule, str):
        raise SampleError("eta is 0: method ls needs noise between adapters; use eta > 0 or method mpa", "eta")
    _check_solver(sample)
    _check_rows(sample)


def _check_solver(sample: Sample) -> None:
    if sample.solver not in SOLVERS:
        raise SampleError(f"solver is {sample.solver!r}: use one of {', '.join(SOLVERS)}", "solver")
    if sample.reference_steps and not sample.record:
        raise SampleError("reference_steps are part of the trajectory: set record=True", "reference_steps")
    if sample.solver != "ddim" and (sample.record or sample.measure_kl):
        raise SampleError(
            f"solver is {sample.solver!r}: record and measure_kl need steps that depend on x_t alone; use ddim",
            "solver",
        )


def _check_rows(sample: Sample) -> None:
    interval = sample.guidance_interval
    if not (isinstance(interval, tuple | list) and len(interval) == 2 and all(isinstance(v, Real) for v in interval)):
        raise SampleError(f"guidance_interval is {interval!r}: use two numbers, such as (0, 0.8)", "guidance_interval")
    if not 0 <= interval[0] < interval[1] <= 1:
        raise SampleError(
            f"guidance_interval is {tuple(interval)}: use shares of the steps with 0 <= start < end <= 1",
            "guidance_interval",
        )
    if sample.ls_schedule not in LS_KINDS and not isinstance(sample.ls_schedule, tuple):
        raise SampleError(
            f"ls_schedule is {sample.ls_schedule!r}: use one of {', '.join(LS_KINDS)}, or a tuple of adapter names",
            "ls_schedule",
        )
    every = sample.refresh_every
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise SampleError(f"refresh_every is {every!r}: use an integer >= 1 (1 is exact)", "refresh_every")
    if not (math.isfinite(sample.row_budget) and sample.row_budget >= 1):
        raise SampleError(f"row_budget is {sample.row_budget}: use a number >= 1, 1 for one model's", "row_budget")
