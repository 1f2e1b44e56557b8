"""Publishers in processes of their own, cheap enough to be killed by the dozen: forked from one with all imported.

Run as a script it takes orders, one JSON line each, and answers them alike. It starts no thread and opens no store, so
that it can fork. What a forked publisher does it appends to a file, whole line by whole line.
"""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from infra.errors import AliasMovedError
from infra.registry import Registry
from infra.settings import Settings
from infra.storage import open_store

# Writers that wait for one another this long wait for one that died.
MEETING_S = 300
# What a local store asks of the operating system, as sys.addaudithook names it; reported before it is done.
FILE_EVENTS = {"open", "os.link", "os.rename", "os.remove", "os.mkdir", "fcntl.flock"}


class Crew:
    """The other end of the script: starts publishers and waits for them. A context manager."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._told = 0
        self._process = subprocess.Popen(
            [sys.executable, "-m", "registry_parts.crew"],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(_paths())},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> "Crew":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def publish(self, settings: Settings, seeds: list[int], *, die_at: int = 0, promote: bool = False) -> "Member":
        """Start a publisher of these seeds; with `die_at`, it kills itself at the nth thing it asks of its disk."""
        return self._start("publish", settings, {"seeds": seeds, "die_at": die_at, "promote": promote})[0]

    def race(self, settings: Settings, writers: int, rounds: int) -> list["Member"]:
        """Start writers that publish and promote the same, round by round, at the same time."""
        return self._start("race", settings, {"rounds": rounds}, count=writers)

    def ask(self, order: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def _start(self, task: str, settings: Settings, options: dict[str, Any], count: int = 1) -> list["Member"]:
        secret = settings.s3_secret.get_secret_value() if settings.s3_secret else None
        plain = settings.model_dump(mode="json", exclude_unset=True) | ({"s3_secret": secret} if secret else {})
        told = [self.folder / f"told-{self._told + n}" for n in range(count)]
        self._told += count
        for path in told:
            path.touch()
        order = {"settings": plain, "folder": str(self.folder), "told": [str(path) for path in told], **options}
        pids = self.ask({"task": task, **order})
        return [Member(self, pid, path) for pid, path in zip(pids, told, strict=True)]


class Member:
    """One publisher, running or ended."""

    def __init__(self, crew: Crew, pid: int, told: Path) -> None:
        self.crew, self.pid, self._told = crew, pid, told

    def told(self) -> list[dict[str, Any]]:
        """What it has said so far."""
        whole, _, _ = self._told.read_text().rpartition("\n")
        return [json.loads(line) for line in whole.splitlines()]

    def kill(self) -> None:
        """SIGKILL; a publisher that has ended meanwhile stays a zombie until `wait`, so its id is still its own."""
        os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> int:
        """Its exit code, -9 when it was killed."""
        return int(self.crew.ask({"wait": self.pid}))


def _paths() -> Iterator[str]:
    """Where the script finds what this process has imported: this folder's parent, and the four packages."""
    yield str(Path(__file__).parents[1])
    yield str(Path(sys.modules[Registry.__module__].__file__ or "").parents[1])
    if path := os.environ.get("PYTHONPATH"):
        yield path


def publish_task(order: dict[str, Any], say: Callable[..., None]) -> None:
    from registry_parts.subjects import promote, publish

    settings = Settings(**order["settings"])
    registry = Registry(open_store(settings=settings))
    if order["die_at"]:
        _die_at(order["die_at"], settings.store_url.removeprefix("file://"))
    for seed in order["seeds"]:
        say(begins=seed, at=time.monotonic())
        record = publish(registry, Path(order["folder"]), seed)
        say(seed=seed, version=record.version, at=time.monotonic())
        if order["promote"]:
            promote(registry, record)


def race_task(order: dict[str, Any], say: Callable[..., None], writer: int, meet: Callable[[], Any]) -> None:
    """Each round: all publish one content, then all move one alias away from where it is, to versions of their own."""
    from registry_parts.subjects import NAME, publish

    registry = Registry(open_store(settings=Settings(**order["settings"])))
    for seed in range(order["rounds"]):
        meet()
        record = publish(registry, Path(order["folder"]), seed)
        say(round=seed, version=record.version, digest=record.digest)
        holds = registry.aliases(NAME, "adapter").get("champion")
        others = [version for version in range(1, seed + 2) if not holds or version != holds.version]
        meet()
        try:
            entry = registry.promote(
                NAME,
                others[writer % len(others)],
                actor=f"writer {writer}",
                reason=f"round {seed}",
                kind="adapter",
                expected_seq=seed,
            )
        except AliasMovedError as error:
            say(round=seed, refused=str(error))
        else:
            say(round=seed, moved=entry.seq, nonce=entry.nonce)


def _die_at(moment: int, root: str) -> None:
    """Kill this process just before it asks for the nth time for something below `root`, or for a lock."""
    left = moment

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if event in FILE_EVENTS and (event == "fcntl.flock" or str(arguments[0]).startswith(root)):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


@contextmanager
def _saying(path: str) -> Iterator[Callable[..., None]]:
    with open(path, "ab", buffering=0) as told:

        def say(**facts: Any) -> None:
            told.write(json.dumps(facts).encode() + b"\n")

        yield say


def _fork(task: Callable[[Callable[..., None]], None], told: str) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.dup2(2, 1)
        with _saying(told) as say:
            try:
                task(say)
                code = 0
            except BaseException as error:
                say(error=f"{type(error).__name__}: {error}")
    finally:
        os._exit(code)


def _obey(order: dict[str, Any]) -> Any:
    if "wait" in order:
        return os.waitstatus_to_exitcode(os.waitpid(order["wait"], 0)[1])
    if order["task"] == "publish":
        return [_fork(lambda say: publish_task(order, say), told) for told in order["told"]]
    barrier = multiprocessing.get_context("fork").Barrier(len(order["told"]))
    return [
        _fork(lambda say, n=n: race_task(order, say, n, lambda: barrier.wait(MEETING_S)), told)
        for n, told in enumerate(order["told"])
    ]


def main() -> None:
    import infra.s3_store  # noqa: F401  once for all that are forked

    for line in sys.stdin:
        print(json.dumps(_obey(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
