"""Checkpoints as directories, written whole or not at all: the adapter beside the trainer's state.

The rule is the same wherever they lie: files first, then one manifest of their sizes and sha256, which is the
commit. The newest checkpoint whose files verify is the latest.
"""

import hashlib
import io
import json
import logging
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError

from blend.finetune.errors import CheckpointError, ResumeError
from blend.finetune.metadata import adapter_metadata
from blend.finetune.trainer import Trainer

STATE_FILE = "state.pt"
ADAPTER_FILE = "pytorch_lora_weights.safetensors"
MANIFEST_FILE = "checkpoint.json"
KEPT = 2

log = logging.getLogger(__name__)
# name -> {"size": bytes, "sha256": hex}
Manifest = Mapping[str, Mapping[str, Any]]


class Checkpoints(Protocol):
    """Where a run keeps its checkpoints; one process saves at a time, any may read."""

    def save(self, trainer: Trainer) -> Path:
        """Keep the trainer's state for good; returns a directory on this machine."""

    def latest(self) -> Path | None:
        """A directory on this machine with the newest checkpoint that verifies; None when there is none."""


def write_checkpoint(trainer: Trainer, directory: Path) -> Path:
    """Write adapter, state and manifest into an empty or new directory, on disk for good."""
    directory.mkdir(parents=True, exist_ok=True)
    config = trainer.config
    trainer.bank.save(config.name, directory, adapter_metadata(config, trainer.history))
    state = io.BytesIO()  # on a full disk torch.save itself raises a RuntimeError of its own, not OSError
    torch.save(trainer.state_dict(), state)
    (directory / STATE_FILE).write_bytes(state.getbuffer())
    files = {path.name: describe_file(path) for path in sorted(directory.iterdir())}
    (directory / MANIFEST_FILE).write_text(json.dumps({"files": files}, indent=2) + "\n", encoding="utf-8")
    return directory


def describe_file(path: Path) -> dict[str, Any]:
    """Size in bytes and sha256 of a file."""
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def parse_manifest(data: bytes) -> Manifest:
    """The files of a manifest; ValueError where it is none."""
    files = json.loads(data)["files"] if data.strip() else None
    if not isinstance(files, dict) or not all(Path(name).name == name for name in files) or STATE_FILE not in files:
        raise ValueError("not the manifest of a checkpoint")
    return files


def find_damage(directory: Path) -> str | None:
    """What is wrong with a checkpoint's directory by its manifest; None when nothing is."""
    try:
        for name, facts in parse_manifest((directory / MANIFEST_FILE).read_bytes()).items():
            if describe_file(directory / name) != dict(facts):
                return f"{name} is not what was written"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return str(error)
    return None


def read_state(directory: Path) -> dict[str, Any]:
    """The state of a checkpoint, tensors on the CPU; ResumeError where it cannot be read."""
    try:
        return parse_state((directory / STATE_FILE).read_bytes())
    except Exception as error:
        raise ResumeError(
            f"the checkpoint {directory} cannot be read ({error}): remove it to go on from an earlier one"
        ) from error


def parse_state(data: bytes) -> dict[str, Any]:
    """The state in the bytes of a STATE_FILE, tensors on the CPU."""
    state: dict[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    return state


def iteration_of(directory: Path) -> int:
    """The iteration in the name of a checkpoint's directory."""
    return int(directory.name.rsplit("_", 1)[1])


class CheckpointFolder:
    """The checkpoints of one run on a disk that all its nodes see; a crash leaves the previous one untouched."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def latest(self) -> Path | None:
        """The newest checkpoint that verifies, saying which do not; ResumeError when there are some and none does."""
        found = self._all()
        for path in reversed(found):
            damage = find_damage(path)
            if damage is None:
                return path
            log.warning("the checkpoint %s is damaged (%s): going on from an earlier one", path, damage)
        if found:
            raise ResumeError(
                f"none of the {len(found)} checkpoints in {self.directory} is whole: remove the directory to train anew"
            )
        return None

    def save(self, trainer: Trainer) -> Path:
        """Write beside, then rename: the name exists only when every byte does. CheckpointError when it cannot."""
        try:
            return self.adopt(write_checkpoint(trainer, self.unfinished()), trainer.iteration)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"the checkpoint of iteration {trainer.iteration} cannot be written to {self.directory} "
                f"({getattr(error, 'strerror', None) or error}): make room there and run again to resume from the one "
                "before"
            ) from error

    def unfinished(self) -> Path:
        """A new directory to write a checkpoint into, which a crash may leave behind."""
        path = self.directory / f".partial_{secrets.token_hex(8)}"
        path.mkdir(parents=True)
        return path

    def adopt(self, partial: Path, iteration: int) -> Path:
        """Give a complete directory its name, then remove what is no longer needed."""
        final = self.directory / f"iteration_{iteration:06d}"
        for path in [*partial.iterdir(), partial]:
            _sync(path)
        if final.exists():
            final.rename(self.unfinished() / final.name)
        partial.rename(final)
        _sync(self.directory)
        older = [path for path in self._all() if iteration_of(path) < iteration]
        for old in [*older[: 1 - KEPT], *self.directory.glob(".partial_*")]:
            shutil.rmtree(old, ignore_errors=True)
        return final

    def _all(self) -> list[Path]:
        return sorted(self.directory.glob("iteration_*"))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
