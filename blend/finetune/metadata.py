"""What an adapter's weight file says of itself: a handful of facts in the header of the safetensors file."""

from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from blend.finetune.config import TrainConfig


def adapter_metadata(config: TrainConfig, history: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Text by name, of the adapter as it is after the last line of `history` (that of kept_iteration where it has one).

    kl_weight is alpha in force at the end; path_kl in nats is that of the held-out images where they were evaluated in
    that iteration, else of its rollouts; it and kl_target are left out where there is none.
    """
    last: Mapping[str, Any] = history[-1] if history else {"iteration": 0}
    kept = last.get("kept_iteration", last["iteration"])
    line = next((line for line in history if line["iteration"] == kept), last)
    facts = {
        "reward": config.reward_label,
        "objective": config.objective,
        "kl_weight": repr(line.get("kl_weight", config.kl_weight)),
        "kl_target": config.kl_target,
        "path_kl": line.get("held_out_path_kl", line.get("path_kl")),
        "iteration": line["iteration"],
        "seed": config.seed,
        "diffusion_blend_version": _version(),
    }
    return {name: str(value) for name, value in facts.items() if value is not None}


def _version() -> str | None:
    try:
        return version("diffusion-blend")
    except PackageNotFoundError:
        return None  # the folder alone, on a machine that has torch and diffusers and nothing else of ours
