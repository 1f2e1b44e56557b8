"""Which mixes to compare sizes by: every reward in as many of a size as every other, and in as good company."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Mix = tuple[int, ...]
Design = dict[int, list[Mix]]


def company(effects: NDArray[np.float64], mixes: Sequence[Mix]) -> float:
    """Mean gain in a reward from the other adapters of its mixes, each alone; effects[j, i] is adapter j's in reward i.

    Where it differs between sizes, so do their mixes in more than how many rewards they have.
    """
    return float(np.mean([effects[j, i] for mix in mixes for i in mix for j in mix if i != j]))


def fairest(effects: ArrayLike) -> Design:
    """Of all designs for six rewards, the one in which the sizes' companies differ least from that of all six.

    Three pairs and two triples of all the rewards, the three fours that the pairs leave, and all six.
    """
    table = np.asarray(effects, dtype=np.float64)
    goal = company(table, [tuple(range(6))])
    return min(_designs(), key=lambda design: max(abs(company(table, mixes) - goal) for mixes in design.values()))


def _designs() -> Iterator[Design]:
    everything = range(6)
    triples = [[(0, *rest), _others((0, *rest))] for rest in combinations(everything[1:], 2)]
    for pairs in _pairings(tuple(everything)):
        for split in triples:
            yield {2: pairs, 3: split, 4: [_others(pair) for pair in pairs], 6: [tuple(everything)]}


def _pairings(left: Mix) -> Iterator[list[Mix]]:
    """All ways of putting these into pairs."""
    if not left:
        yield []
    for partner in left[1:]:
        rest = tuple(one for one in left[1:] if one != partner)
        yield from ([(left[0], partner), *others] for others in _pairings(rest))


def _others(mix: Mix) -> Mix:
    return tuple(one for one in range(6) if one not in mix)
