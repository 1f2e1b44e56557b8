"""What the fault suite publishes, and how it tells whether a registry is whole: shared by tests and benchmark."""

import tempfile
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from infra.doctor import examine
from infra.manifests import WEIGHTS_FILE, AdapterFacts, AdapterRecord, AliasEntry, BaseIdentity
from infra.registry import Registry

NAME = "colour"
BASE = BaseIdentity(source="sprites", sha256="ab" * 32)


def write_adapter(root: Path, seed: int) -> Path:
    """Directory with LoRA weights that differ from seed to seed; several processes may ask for the same."""
    directory = root / f"adapter-{seed}"
    if not directory.exists():
        root.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=".making-", dir=root))
        noise = np.random.default_rng(seed).normal(size=(4, 64)).astype(np.float32)
        save_file({"unet.block.to_q.lora_A.weight": noise}, made / WEIGHTS_FILE)
        # Another process may have been quicker: the bytes are the same.
        with suppress(OSError):
            made.rename(directory)
    return directory


def facts_of(seed: int) -> AdapterFacts:
    return AdapterFacts(
        base=BASE,
        rank=2,
        alpha=2.0,
        target_modules=("to_q", "to_v"),
        reward="colourfulness",
        reward_version="1",
        kl_weight=0.1,
        seed=seed,
    )


def publish(registry: Registry, root: Path, seed: int) -> AdapterRecord:
    """Publish the adapter of this seed, written anew below `root`: the seed stands for the content."""
    return registry.publish_adapter(NAME, write_adapter(root, seed), facts_of(seed))


def promote(registry: Registry, record: AdapterRecord) -> AliasEntry:
    """Move `champion` to this version, unless it is there."""
    return registry.promote(NAME, record.version, actor="test", reason=f"seed {record.seed}", kind="adapter")


def versions(registry: Registry) -> list[AdapterRecord]:
    """All that a reader sees, oldest first; AssertionError where the store holds another set of manifests."""
    found = registry.versions(NAME, "adapter") if NAME in registry.names("adapter") else []
    records = [record for record in found if isinstance(record, AdapterRecord)]
    assert [record.version for record in records] == list(range(1, len(records) + 1))
    listed = registry.store.list(f"adapters/{NAME}/versions")
    assert listed == [f"adapters/{NAME}/versions/{record.version:06d}.json" for record in records]
    return records


def fetch_all(registry: Registry, records: list[AdapterRecord]) -> None:
    """Download every file of these records, each hashed again."""
    with tempfile.TemporaryDirectory() as directory:
        for record in records:
            registry.fetch(record, Path(directory) / str(record.version))


@dataclass
class Outcome:
    """What became of a trial. Nothing of it may be wrong but by a fault of infra."""

    operations: int = 0
    repeats: int = 0
    lost: int = 0
    duplicated: int = 0
    wrong: list[str] = field(default_factory=list)
    refusals: Counter[str] = field(default_factory=Counter)

    def judge(self, registry: Registry, seeds: set[int], *, whole: bool = True) -> None:
        """Compare what was published (told or intended) with what is there, once each and whole."""
        seen = Counter(record.seed for record in versions(registry))
        self.lost += len(seeds - set(seen))
        self.duplicated += sum(seen.values()) - len(seen)
        self.wrong += [f"seed {seed} was never published" for seed in set(seen) - seeds]
        if whole:
            self.wrong += [f"{finding.where}: {finding.problem}" for finding in examine(registry)]
