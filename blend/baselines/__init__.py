"""The rivals: other ways to follow several rewards at once, on the same model, engine and steps as the blend.

README.md beside this file names each one's source, its equation, its cost, and where it departs from the source.
Rewarded Soup needs nothing here: it is method `soup` of the engine.
"""

from blend.baselines.best_of_n import best_of_n, copies_within
from blend.baselines.blockwise import blockwise
from blend.baselines.composition import composite, switch
from blend.baselines.found import Cost, Found
from blend.baselines.gradient_guidance import reward_guided
from blend.rewards.weighted import WeightedReward

__all__ = [
    "Cost",
    "Found",
    "WeightedReward",
    "best_of_n",
    "blockwise",
    "composite",
    "copies_within",
    "reward_guided",
    "switch",
]
