"""How far each solver ends from the converged ODE at few steps, and how `ls` follows `mpa` under each: the sprites.

    python tests/bench/solvers.py

ODE: two adapters blended, guidance 3, eta 0; the reference is DPM-Solver++ at REFERENCE steps. `ddim` takes the model's
own timesteps, `ddim_same_timesteps` those of DPM-Solver++, so that the gain of the second order stands apart from that
of the timesteps; `dpmpp_own_spacing` is DPM-Solver++ under the model's own "leading" spacing.
`ls`: three adapters, eta 1, distance to mpa with the same solver; `dpmpp_first_order` holds all steps to first
order, and is still measured against mpa in second order.

Distances are root mean squares over a sample's latents: the median over the samples, and pooled over all of them. The
two tell different things: a sample near the border of two images may land in the other one, with a distance near 1.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from engine_parts.workload import Workload, open_workload
from figures import write_figures
from tqdm import tqdm

from blend.courses import Course
from blend.engine import BlendEngine
from blend.preference import Preference
from blend.solvers import dpmpp_timesteps, extrapolation

STEPS = (5, 8, 10, 15, 20, 30)
LS_STEPS = (10, 20)
REFERENCE = 120
SAMPLES = 16
Change = Callable[[BlendEngine, Course], Course]


def main() -> None:
    torch.set_num_threads(1)
    workload = open_workload()
    two = dict.fromkeys(workload.basis[:2], 0.5)
    reference = denoise(workload, two, "dpmpp", REFERENCE, eta=0.0)
    figures: dict[str, object] = {"samples": SAMPLES, "reference_steps": REFERENCE}
    contestants: dict[str, tuple[str, Change | None]] = {
        "ddim": ("ddim", None),
        "ddim_same_timesteps": ("dpmpp", first_order),
        "dpmpp": ("dpmpp", None),
        "dpmpp_own_spacing": ("dpmpp", own_spacing),
    }
    for steps in tqdm(STEPS, unit="count"):
        figures[f"ode_{steps}_steps"] = {
            name: distance(denoise(workload, two, solver, steps, eta=0.0, change=change), reference)
            for name, (solver, change) in contestants.items()
        }
    for steps in tqdm(LS_STEPS, unit="count"):
        figures[f"ls_{steps}_steps"] = follow(workload, steps)
    write_figures("solvers", figures)


def follow(workload: Workload, steps: int) -> dict[str, object]:
    """Distances of method ls to method mpa."""
    weights = dict(zip(workload.basis, (0.2, 0.3, 0.5), strict=False))
    exact = {solver: denoise(workload, weights, solver, steps) for solver in ("ddim", "dpmpp")}
    found: dict[str, object] = {}
    for schedule in ("systematic", "iid"):
        for name, solver, change in (
            ("ddim", "ddim", None),
            ("dpmpp", "dpmpp", None),
            ("dpmpp_first_order", "dpmpp", first_order),
        ):
            latents = denoise(workload, weights, solver, steps, method="ls", change=change, ls_schedule=schedule)
            found[f"{name}_{schedule}"] = distance(latents, exact[solver])
    return found


def denoise(
    workload: Workload,
    weights: Mapping[str, float],
    solver: str,
    steps: int,
    *,
    eta: float = 1.0,
    method: str = "mpa",
    change: Change | None = None,
    **fields: str,
) -> torch.Tensor:
    """Return latents [SAMPLES, C, h, w]."""
    engine = workload.fresh_engine(96)
    preference = Preference(weights=dict(weights), method=method)
    asked = {"preference": preference, "eta": eta, "solver": solver, **fields}
    tickets = [engine.submit(replace(workload.sample(index, steps), **asked)) for index in range(SAMPLES)]
    if change is not None:
        for running in engine._waiting:
            running.course = change(engine, running.course)
    outputs = {}
    while not engine.idle:
        outputs.update(engine.step())
    latents = [outputs[ticket].latents for ticket in tickets]
    return torch.stack([one for one in latents if one is not None])


def first_order(engine: BlendEngine, course: Course) -> Course:
    """Without extrapolation DPM-Solver++ is DDIM."""
    return replace(course, factors=torch.zeros_like(course.factors))


def own_spacing(engine: BlendEngine, course: Course) -> Course:
    config = engine.model.scheduler.config
    timesteps = dpmpp_timesteps(
        len(course.timesteps),
        num_train_timesteps=config.num_train_timesteps,
        spacing=config.timestep_spacing,
        offset=config.steps_offset,
    )
    factors = extrapolation(timesteps, engine.model.scheduler.alphas_cumprod)
    return Course(timesteps, torch.cat([timesteps[1:], torch.tensor([-1])]), factors, 1.0)


def distance(latents: torch.Tensor, reference: torch.Tensor) -> dict[str, float]:
    squared = (latents - reference).square().mean((1, 2, 3))
    return {"median": round(float(squared.sqrt().median()), 4), "pooled": round(float(squared.mean().sqrt()), 4)}


if __name__ == "__main__":
    main()
