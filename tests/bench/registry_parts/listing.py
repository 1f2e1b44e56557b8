"""What listing versions and finding the newest cost, beside a plain scan that opens every manifest."""

import hashlib
import os
import secrets
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from infra.local_store import LocalStore
from infra.manifests import SCHEMA_VERSION, WEIGHTS_FILE, AdapterRecord, content_sha256, seal, unseal
from infra.storage import Listed
from infra.versions import VersionLog

VERSIONS = 10_000
REPEATS = 5


class Counting(LocalStore):
    """Counts what is asked of the store."""

    heads = listings = 0

    def head(self, path: str) -> str | None:
        self.heads += 1
        return super().head(path)

    def listing(self, prefix: str) -> list[Listed]:
        self.listings += 1
        return super().listing(prefix)


def measure(versions: int = VERSIONS, repeats: int = REPEATS) -> dict[str, Any]:
    """Medians of interleaved repeats on a local directory, its files in the system's cache.

    `list_10k_seconds_ratio` is our listing of all versions (number, size, age) over a scan that lists the directory,
    reads every manifest and validates it. `names_10k_seconds` is the least that any listing can take: the names alone.
    """
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        _fill(root / "adapters" / "many" / "versions", versions)
        store = Counting(root)
        log = VersionLog(store, AdapterRecord, "adapters/many")
        ways: dict[str, Callable[[], object]] = {
            "list": log.listed,
            "scan": lambda: _scan(root / "adapters" / "many" / "versions"),
            "names": lambda: sorted(os.listdir(root / "adapters" / "many" / "versions")),
            "newest": lambda: log.read(log.latest()),
            "read_all": log.read_all,
        }
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(repeats):
            for way, call in ways.items():
                started = time.perf_counter()
                call()
                seconds[way].append(time.perf_counter() - started)
        assert set(log.listed()) == set(range(1, versions + 1)) == set(_scan(root / "adapters" / "many" / "versions"))
        store.heads = store.listings = 0
        assert log.latest() == versions
        median = {way: statistics.median(values) for way, values in seconds.items()}
        return {
            "versions": versions,
            "list_10k_seconds": median["list"],
            "scan_10k_seconds": median["scan"],
            "list_10k_seconds_ratio": median["list"] / median["scan"],
            "names_10k_seconds": median["names"],
            "read_all_10k_seconds": median["read_all"],
            "newest_seconds": median["newest"],
            "newest_requests": store.heads,
            "newest_listings": store.listings,
        }


def _scan(folder: Path) -> dict[int, AdapterRecord]:
    records = (unseal(AdapterRecord, path.read_bytes(), str(path)) for path in sorted(folder.glob("*.json")))
    return {record.version: record for record in records}


def _fill(folder: Path, versions: int) -> None:
    """Manifests as a registry writes them, without its fsync."""
    folder.mkdir(parents=True)
    for version in range(1, versions + 1):
        fields: dict[str, Any] = {
            "kind": "adapter",
            "base": {"source": "sprites", "sha256": "ab" * 32},
            "rank": 8,
            "alpha": 8.0,
            "target_modules": ["to_k", "to_out.0", "to_q", "to_v"],
            "reward": "colourfulness",
            "reward_version": "1",
            "kl_weight": 0.1,
            "seed": version,
            "files": [
                {"path": name, "size": 1000, "sha256": hashlib.sha256(f"{name} {version}".encode()).hexdigest()}
                for name in ("README.md", WEIGHTS_FILE)
            ],
        }
        commit = {
            "schema_version": SCHEMA_VERSION,
            "name": "many",
            "version": version,
            "content_sha256": content_sha256(fields),
            "nonce": secrets.token_hex(16),
            "created_at": datetime.now(UTC).isoformat(),
        }
        (folder / f"{version:06d}.json").write_bytes(seal(fields | commit))
