"""What a scorer is told: the job, its items, and by what name the ledger knows a sample."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from blend.engine import Sample
from blend.preference import Preference
from infra.manifests import canonical
from workers.bundles import LoadedBundle
from workers.evaluation.config import EvaluateConfig
from workers.evaluation.grid import ORACLE, Cell
from workers.evaluation.rivals import Rival, composed, rival_of

# Diversity is measured among so many seeds of a prompt, so that seeds that are added later leave the others' be.
SEED_BLOCK = 4
# Of a weight: a third in a run file and one worked out are the same preference.
DIGITS = 9


@dataclass(frozen=True, slots=True)
class OracleAdapter:
    """A retrained adapter: its name in the engine, its files, and the sha256 of what is in them."""

    name: str
    path: Path
    content_sha256: str


@dataclass(frozen=True, slots=True)
class Item:
    """Prompts [P], as positions in the job, of one cell with some seeds each; of `pictures` the first seed is kept."""

    cell: int
    prompts: tuple[int, ...]
    seeds: tuple[int, ...]
    pictures: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Job:
    """All that a scorer needs to know; small enough to send to every actor.

    `objectives[i]` is the reward of adapter i, `scales[i]` its mean and standard deviation under the base.
    """

    config: EvaluateConfig
    bundle: LoadedBundle
    basis: tuple[str, ...]
    objectives: tuple[str, ...]
    scales: tuple[tuple[float, float], ...]
    cells: tuple[Cell, ...]
    prompts: tuple[str, ...]
    rewards: dict[str, str]  # name -> version
    oracles: Mapping[Cell, OracleAdapter] = field(default_factory=dict)

    def rival(self, cell: int) -> Rival | None:
        """The rival that a cell measures; None for the engine's own methods and the oracles."""
        return rival_of(self.cells[cell].method)

    def weights(self, cell: int) -> dict[str, float]:
        """Adapter -> weight of a cell, those of weight 0 left out."""
        cell_weights = zip(self.basis, self.cells[cell].weights, strict=True)
        return {name: weight for name, weight in cell_weights if weight > 0}

    def sample(self, cell: int, prompt: str, seed: int) -> Sample:
        """What the engine is asked for; of a rival that searches, the base sample it starts from."""
        config, asked, rival = self.config, self.cells[cell], self.rival(cell)
        searches = rival is not None and rival.searches
        preference = Preference.base() if searches else asked.preference(self.basis)
        if asked.method == ORACLE:
            preference = Preference(weights={self.oracles[asked].name: 1.0})
        sample = Sample(
            prompt=prompt,
            preference=preference,
            seed=seed,
            num_inference_steps=int(config.num_inference_steps or 0),
            guidance_scale=float(config.guidance_scale or 0.0),
            eta=config.eta,
            height=config.height,
            width=config.width,
            measure_kl=False if searches else config.path_kl,
        )
        return sample if rival is None or searches else composed(rival, sample, list(self.weights(cell)))

    def key(self, cell: int, prompt: str, seed: int) -> str:
        """What decides a sample, and nothing else, as a sha256."""
        return _key(self._facts[cell], prompt, seed)

    @cached_property
    def _facts(self) -> list[str]:
        return [hashlib.sha256(canonical(self._cell_facts(cell))).hexdigest() for cell in range(len(self.cells))]

    def _cell_facts(self, cell: int) -> dict[str, Any]:
        asked, rival = self.sample(cell, "", 0), self.rival(cell)
        preference = asked.preference
        mixed = preference.weights if preference.kl_lambda else {}
        contents = {name: record.content_sha256 for name, record in self.bundle.adapter_records.items()}
        contents |= {oracle.name: oracle.content_sha256 for oracle in self.oracles.values()}
        facts = {
            "sample": {name: value for name, value in asdict(asked).items() if name != "preference"},
            "method": preference.method if len(mixed) > 1 else "one source",
            "kl_lambda": preference.kl_lambda,
            "adapters": sorted(
                [contents.get(name, name), round(weight, DIGITS)] for name, weight in mixed.items() if weight
            ),
            "base": self.bundle.record.base.sha256,
            "software": version("diffusion-blend"),
        }
        if rival is not None and rival.searches:
            terms = zip(self.basis, self.objectives, self.scales, strict=True)
            shares = self.weights(cell)
            facts["search"] = [rival.kind, rival.numbers]
            facts["reward"] = [
                [name, self.rewards[name], shares[one], scale] for one, name, scale in terms if one in shares
            ]
        return facts


@lru_cache(maxsize=1 << 17)
def _key(cell_facts: str, prompt: str, seed: int) -> str:
    """Kept: every pass over a grid asks for it again."""
    return hashlib.sha256(canonical({"sample": [cell_facts, prompt, seed]})).hexdigest()


def seed_blocks(seeds: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """The seeds that are generated and compared together."""
    return chunks(seeds, SEED_BLOCK)


def plan_items(job: Job, missing: set[str], pictured: set[str]) -> list[Item]:
    """The items that make what is missing, each sample once, however many cells it belongs to.

    Items are cut from the whole grid, not from what is missing: a batch of an evaluation that goes on is the batch it
    would have been. `pictured`: keys of samples whose picture is kept.
    """
    planned: set[str] = set()
    items = []
    for cell in range(len(job.cells)):
        for block in seed_blocks(job.config.seeds):
            size = max(1, job.config.batch_size // len(block))
            for positions in chunks(range(len(job.prompts)), size):
                wanted = [at for at in positions if _first(job, cell, at, block, missing, planned)]
                shown = frozenset(at for at in wanted if job.key(cell, job.prompts[at], block[0]) in pictured)
                if wanted:
                    items.append(Item(cell, tuple(wanted), block, shown))
    return items


def _first(job: Job, cell: int, at: int, block: Sequence[int], missing: set[str], planned: set[str]) -> bool:
    """Whether the block is missing and no earlier item makes it; takes it down as planned."""
    keys = {job.key(cell, job.prompts[at], seed) for seed in block}
    if not keys & missing or keys <= planned:
        return False
    planned |= keys
    return True


def chunks(values: Sequence[int], size: int) -> Iterator[tuple[int, ...]]:
    """The values in order, so many at a time."""
    for start in range(0, len(values), size):
        yield tuple(values[start : start + size])
