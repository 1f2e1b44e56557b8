"""Writers that all publish the same adapter and move the same alias at the same time: one winner, typed losers."""

from itertools import pairwise

from registry_parts.crew import Crew
from registry_parts.subjects import NAME, Outcome, versions

from infra.registry import Registry
from infra.settings import Settings
from infra.storage import open_store


def race(crew: Crew, settings: Settings, writers: int, rounds: int) -> Outcome:
    """Every round's told outcome against what the store holds afterwards. Writers are processes, as in life."""
    members = crew.race(settings, writers, rounds)
    codes = [member.wait() for member in members]
    told = [line | {"writer": writer} for writer, member in enumerate(members) for line in member.told()]
    registry = Registry(open_store(settings=settings))
    outcome = Outcome(operations=2 * writers * rounds)
    outcome.wrong += [f"writer {n} ended with {code}" for n, code in enumerate(codes) if code]
    outcome.wrong += [line["error"] for line in told if "error" in line]
    outcome.judge(registry, set(range(rounds)))
    digests = {record.seed: (record.version, record.digest) for record in versions(registry)}
    history = registry.history(NAME, kind="adapter")
    if [entry.seq for entry in history] != list(range(1, rounds + 1)):
        outcome.wrong.append(f"the history is {[entry.seq for entry in history]}")
    if any(one.version == other.version for one, other in pairwise(history)):
        outcome.wrong.append("the history holds a move that moved nothing")
    for seed in range(rounds):
        lines = [line for line in told if line.get("round") == seed]
        published = {(line["version"], line["digest"]) for line in lines if "digest" in line}
        if published != {digests.get(seed)}:
            outcome.wrong.append(f"round {seed}: told {published}, there is {digests.get(seed)}")
        winners = [(f"writer {line['writer']}", line["nonce"]) for line in lines if "moved" in line]
        if winners != [(entry.actor, entry.nonce) for entry in history if entry.seq == seed + 1]:
            outcome.wrong.append(f"round {seed}: winners {winners}")
        outcome.refusals["AliasMovedError"] += sum("refused" in line for line in lines)
    return outcome
