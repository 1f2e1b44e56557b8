"""Caption grammar of the sprites world: one or two coloured objects.

"A red colored car." or "A blue cup and a green cell phone." (the grammar of the Diffusion Blend paper's prompts).
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache
from itertools import zip_longest
from typing import Literal

Split = Literal["train", "test"]
SPLITS = ("train", "test")
PAIRS = 96
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
OBJECTS = (
    "apple",
    "banana",
    "bird",
    "boat",
    "bottle",
    "car",
    "cat",
    "cell phone",
    "chair",
    "clock",
    "cup",
    "fish",
    "flower",
    "house",
    "tree",
    "umbrella",
)


@dataclass(frozen=True, slots=True)
class Thing:
    """One coloured object of a caption."""

    colour: str
    object: str


# One colour per object is never drawn while the base model is trained: the compositional test.
HELD_OUT = frozenset(Thing(COLOURS[(3 * index + 1) % len(COLOURS)], name) for index, name in enumerate(OBJECTS))
SINGLES = tuple(Thing(colour, name) for name in OBJECTS for colour in COLOURS)


def write_caption(things: tuple[Thing, ...]) -> str:
    """The caption of one or two things, e.g. "A blue cup and a green cell phone."."""
    if len(things) == 1:
        return f"{_article(things[0].colour).capitalize()} {things[0].colour} colored {things[0].object}."
    left, right = things
    return (
        f"{_article(left.colour).capitalize()} {left.colour} {left.object} "
        f"and {_article(right.colour)} {right.colour} {right.object}."
    )


def parse_caption(caption: str) -> tuple[Thing, ...]:
    """The inverse of `write_caption`; ValueError for any other sentence."""
    words = caption.strip().rstrip(".").lower().replace(" colored ", " ").split(" and ")
    things = []
    for phrase in words:
        _, _, named = phrase.partition(" ")
        colour, _, name = named.partition(" ")
        if colour not in COLOURS or name not in OBJECTS:
            raise ValueError(
                f"{caption!r} is not a sprites caption: {phrase!r} needs one of the colours {', '.join(COLOURS)} "
                f"and one of the objects {', '.join(OBJECTS)}; write it as 'A red colored car.'"
            )
        things.append(Thing(colour, name))
    if len(things) > 2:
        raise ValueError(f"{caption!r} names {len(things)} objects; a sprites caption has one or two")
    return tuple(things)


def sample_things(rng: random.Random, *, pair_share: float = 0.5) -> tuple[Thing, ...]:
    """Draw the things of one training scene, never a held-out colour-object pair."""
    count = 2 if rng.random() < pair_share else 1
    things: list[Thing] = []
    while len(things) < count:
        thing = Thing(rng.choice(COLOURS), rng.choice(OBJECTS))
        if thing not in HELD_OUT and thing.object not in {other.object for other in things}:
            things.append(thing)
    return tuple(things)


@lru_cache
def _split() -> tuple[tuple[Thing, ...], tuple[Thing, ...]]:
    """Single things as (train, test): the test part holds every held-out pair and 32 seen ones."""
    seen = [thing for thing in SINGLES if thing not in HELD_OUT]
    random.Random(7).shuffle(seen)
    held_out = sorted(HELD_OUT, key=lambda thing: thing.object)
    return tuple(seen[32:]), (*held_out, *seen[:32])


def single_prompts(split: Split) -> list[str]:
    """112 train or 48 test prompts with one object; the first 16 of the test ones were never seen in pre-training."""
    return [write_caption((thing,)) for thing in _split()[SPLITS.index(split)]]


def pair_prompts(split: Split, count: int = PAIRS) -> list[str]:
    """Prompts with two objects, in a fixed order: of train things only, or with at least one test thing."""
    rng = random.Random(f"pairs of {split}")
    train, test = _split()
    first, second = (train, train) if split == "train" else (test, (*train, *test))
    prompts: list[str] = []
    while len(prompts) < count:
        things = [rng.choice(first), rng.choice(second)]
        rng.shuffle(things)
        caption = write_caption(tuple(things))
        if things[0].object != things[1].object and caption not in prompts:
            prompts.append(caption)
    return prompts


def train_prompts(count: int | None = None) -> list[str]:
    """Up to 208 prompts for fine-tuning, one and two objects by turns as far as both reach."""
    return _by_turns("train")[:count]


def held_out_prompts(count: int | None = None) -> list[str]:
    """Prompts never used in fine-tuning, one and two objects by turns as far as both reach; 144 unless more are asked.

    There are 48 of one object. Those of two go on as long as asked, up to some thousands.
    """
    more = max(0, (count or 0) - len(_by_turns("test")))
    return _by_turns("test", pairs=PAIRS + more)[:count]


def _by_turns(split: Split, pairs: int = PAIRS) -> list[str]:
    turns = zip_longest(single_prompts(split), pair_prompts(split, pairs))
    return [prompt for turn in turns for prompt in turn if prompt is not None]


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"
