"""The registry under races, kills and faults, at full length: what was lost, and what was there twice.

    races       sixteen processes publish the same adapter and move the same alias, round by round
    kills       a publisher is killed at random points while a reader looks
    operations  publishes, promotions and downloads while a tenth of all requests (S3) or calls (local) fail
    listing     10,000 versions listed, beside a plain full scan

The first three run on a local directory and on a real S3 server; the figures at the top count both. The tests in
tests/infra do the same in fewer rounds. --quick and --parts are for trying the script out: figures are shown and not
written. The exit status is 1 when anything at all was wrong.
"""

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from figures import flatten, write_figures
from registry_parts.crew import Crew
from registry_parts.faults import operate
from registry_parts.faulty_store import FaultyStore, Share
from registry_parts.kills import kill_publishers
from registry_parts.races import race
from registry_parts.servers import load_helper, s3_settings
from registry_parts.subjects import Outcome

from infra.registry import Registry
from infra.settings import Settings
from infra.storage import open_store

PARTS = ("races", "kills", "operations", "listing")
WRITERS, RATE = 16, 0.1
FULL = {"races": 40, "kills": 50, "operations": 500}
QUICK = {"races": 2, "kills": 3, "operations": 20}


def run_races(settings: Settings, work: Path, rounds: int) -> tuple[Outcome, dict[str, Any]]:
    with Crew(work) as crew:
        outcome = race(crew, settings, WRITERS, rounds)
    return outcome, {"race_rounds": rounds, "writers": WRITERS, "moves_refused": outcome.refusals["AliasMovedError"]}


def run_kills(settings: Settings, work: Path, kills: int) -> tuple[Outcome, dict[str, Any]]:
    with Crew(work) as crew:
        outcome = kill_publishers(crew, settings, kills)
    return outcome, {"kill_rounds": kills, "committed": outcome.operations, "reads": outcome.refusals["reads"]}


def run_operations(settings: Settings, work: Path, operations: int) -> tuple[Outcome, dict[str, Any]]:
    honest = Registry(open_store(settings=settings))
    with _faulty(settings) as (faulty, counts):
        outcome = operate(faulty, honest, work, operations, say=_say)
    injected = counts()
    figures = {
        "operations": operations,
        "faults_injected": sum(injected.values()),
        "faults": dict(sorted(injected.items())),
        "repeats": outcome.repeats,
    }
    return outcome, figures


@contextmanager
def _faulty(settings: Settings) -> Iterator[tuple[Registry, Callable[[], Counter[str]]]]:
    """The registry as its user sees it, and what was injected so far."""
    if settings.s3_endpoint_url is None:
        share = Share(RATE)
        yield Registry(FaultyStore(open_store(settings=settings), share)), lambda: share.counts
        return
    with load_helper("fault_proxy").FaultProxy(settings.s3_endpoint_url, rate=RATE) as proxy:
        through = settings.model_copy(update={"s3_endpoint_url": proxy.url})
        yield Registry(open_store(settings=through)), lambda: proxy.counts


RUNS = {"races": run_races, "kills": run_kills, "operations": run_operations}


def _say(words: str) -> None:
    print(f"\r{words:<60}", end="", file=sys.stderr, flush=True)


def run_store(settings: Settings, parts: list[str], counts: dict[str, int]) -> tuple[dict[str, Any], list[str]]:
    """Every part on a store of its own: figures by part, and what was wrong."""
    figures: dict[str, Any] = {}
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as directory:
        for part in (part for part in parts if part in RUNS):
            own = settings.model_copy(update={"store_url": f"{settings.store_url}/{part}"})
            outcome, facts = RUNS[part](own, Path(directory) / part, counts[part])
            figures[part] = facts | {"lost": outcome.lost, "duplicated": outcome.duplicated}
            wrong += [f"{part} on {own.store_url}: {words}" for words in outcome.wrong]
            _say("")
            print(f"\r{own.store_url}: {figures[part]}", flush=True)
    return figures, wrong


def summarise(stores: dict[str, dict[str, Any]], wrong: list[str]) -> dict[str, Any]:
    """Sums over stores and parts, then each store's own."""
    keys = ("operations", "faults_injected", "lost", "duplicated", "race_rounds", "kill_rounds")
    parts = [part for store in stores.values() for part in store.values()]
    return {**{key: sum(part.get(key, 0) for part in parts) for key in keys}, "wrong": len(wrong), **stores}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    return parser.parse_args()


def main() -> int:
    options = parse()
    counts = QUICK if options.quick else FULL
    stores: dict[str, dict[str, Any]] = {}
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as directory, s3_settings() as on_s3:
        for name, settings in (("local", Settings(store_url=f"file://{directory}")), ("s3", on_s3)):
            stores[name], found = run_store(settings, options.parts, counts)
            wrong += found
    figures = summarise(stores, wrong)
    if "listing" in options.parts:
        from registry_parts.listing import measure

        listing = measure()
        figures |= {"list_10k_seconds_ratio": listing.pop("list_10k_seconds_ratio"), "listing": listing}
    for words in wrong:
        print(f"wrong: {words}")
    if options.quick or set(options.parts) != set(PARTS):
        print(*(f"{key}: {value}" for key, value in flatten(figures)), sep="\n")
    else:
        write_figures("registry", figures)
    return 1 if wrong or figures["lost"] or figures["duplicated"] else 0


if __name__ == "__main__":
    sys.exit(main())
