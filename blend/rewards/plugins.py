"""Rewards of other packages: each registers a factory in the entry point group `diffusion_blend.rewards`.

Nothing is imported before a reward is asked for by name, so that a broken plugin hurts nobody who does not use it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from importlib.metadata import EntryPoint, entry_points

from blend.rewards import REWARDS, Reward, RewardError

GROUP = "diffusion_blend.rewards"
_NAME = re.compile(r"[a-z][a-z0-9_]{0,62}")


def plugins() -> dict[str, list[EntryPoint]]:
    """Entry points by name in alphabetical order; more than one for a name that several packages claim."""
    found: dict[str, list[EntryPoint]] = {}
    for point in sorted(entry_points(group=GROUP), key=lambda point: (point.name, _package(point))):
        found.setdefault(point.name, []).append(point)
    return found


def described() -> str:
    """The plugins that can be loaded, as error messages list them: `greenness (package greens 1.0)`."""
    lines = [f"{name} (package {_package(points[0])})" for name, points in plugins().items() if name not in REWARDS]
    return ", ".join(lines) or "none installed"


def refuse_claims(name: str) -> None:
    """Raise RewardError where a plugin has the name of a built-in reward: neither could be told from the other."""
    if points := plugins().get(name):
        raise RewardError(
            f"{_origin(points[0])} has the name of a built-in reward: rename it, or uninstall the package"
        )


def load_plugin(points: Sequence[EntryPoint]) -> Reward:
    """Call the factory of the one entry point; RewardError in one line that names the reward and its package."""
    point = points[0]
    if len(points) > 1:
        packages = " and ".join(_package(each) for each in points)
        raise RewardError(f"reward {point.name!r} is registered by packages {packages}: uninstall all but one")
    try:
        reward = point.load()()
        wrong = fault(reward)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise RewardError(f"{_origin(point)} cannot be loaded from {point.value}: {reason}") from error
    if wrong:
        raise RewardError(f"{_origin(point)} is no reward: {wrong}")
    if reward.name != point.name:
        raise RewardError(f"{_origin(point)} calls itself {reward.name!r}: give both one name")
    return reward


def fault(reward: object) -> str | None:
    """What an object lacks to be a Reward; None where it is one. Scores are for blend.rewards.contract to judge."""
    if isinstance(reward, type) or not isinstance(reward, Reward):
        missing = [name for name in ("name", "version", "range", "differentiable") if not hasattr(reward, name)]
        return f"{reward!r} has no {', '.join(missing)}" if missing else f"{reward!r} cannot be called with images"
    if not isinstance(reward.name, str) or not _NAME.fullmatch(reward.name):
        return f"name {reward.name!r} must be 1 to 63 small letters, digits and underscores, a letter first"
    if not isinstance(reward.version, str) or not reward.version:
        return f"version {reward.version!r} must be a string such as '1', another one whenever scores change"
    bounds = reward.range
    if not (isinstance(bounds, tuple) and len(bounds) == 2 and all(isinstance(each, int | float) for each in bounds)):
        return f"range {bounds!r} must be a pair (low, high); infinite ends are allowed"
    if any(math.isnan(each) for each in bounds) or bounds[0] >= bounds[1]:
        return f"range {bounds!r} must have its low end first"
    if not isinstance(reward.differentiable, bool):
        return f"differentiable {reward.differentiable!r} must be True or False"
    return None


def _package(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist is not None else "of unknown name"


def _origin(point: EntryPoint) -> str:
    return f"reward {point.name!r} of package {_package(point)}"
