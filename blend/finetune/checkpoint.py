"""Checkpoints as directories, written whole or not at all: the adapter beside the trainer's state."""

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from blend.finetune.errors import ResumeError
from blend.finetune.metadata import adapter_metadata
from blend.finetune.trainer import Trainer

STATE_FILE = "state.pt"
ADAPTER_FILE = "pytorch_lora_weights.safetensors"
KEPT = 2


def write_checkpoint(trainer: Trainer, directory: Path) -> Path:
    """Write adapter and state into an empty or new directory."""
    directory.mkdir(parents=True, exist_ok=True)
    config = trainer.config
    trainer.bank.save(config.name, directory, adapter_metadata(config, trainer.history))
    torch.save(trainer.state_dict(), directory / STATE_FILE)
    return directory


def read_state(directory: Path) -> dict[str, Any]:
    """The state of a checkpoint, tensors on the CPU; ResumeError where it cannot be read."""
    try:
        state: dict[str, Any] = torch.load(directory / STATE_FILE, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ResumeError(
            f"the checkpoint {directory} cannot be read ({error}): remove it to go on from an earlier one"
        ) from error
    return state


class CheckpointFolder:
    """The checkpoints of one run on a local disk, newest last; a crash leaves the previous one untouched."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def latest(self) -> Path | None:
        """The newest complete checkpoint, if any."""
        found = sorted(self.directory.glob("iteration_*"))
        return found[-1] if found else None

    def save(self, trainer: Trainer) -> Path:
        """Write beside, then rename: the name exists only when every byte does."""
        final = self.directory / f"iteration_{trainer.iteration:06d}"
        partial = self.directory / f".partial_{trainer.iteration:06d}"
        shutil.rmtree(partial, ignore_errors=True)
        write_checkpoint(trainer, partial)
        for path in partial.iterdir():
            _sync(path)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        _sync(self.directory)
        for old in sorted(self.directory.glob("iteration_*"))[:-KEPT]:
            shutil.rmtree(old, ignore_errors=True)
        return final


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
