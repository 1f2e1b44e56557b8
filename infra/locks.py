"""Locks of the kernel's on files and directories: held by a process, and let go when it ends, however it ends."""

import fcntl
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Directories in use by this process, with the descriptor that holds each lock.
leases: dict[Path, int] = {}
_leasing = threading.Lock()


@contextmanager
def locked(path: Path, flags: int, *, wait: bool = False) -> Iterator[bool]:
    """Hold the kernel's lock on a file or directory; False when another holds it, or the path is a new one by then."""
    descriptor = os.open(path, flags, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            mine = False
        else:
            mine = is_still(path, descriptor)
        yield mine
    finally:
        os.close(descriptor)


def lease(directory: Path) -> bool:
    """Keep a directory from being trimmed away while this process lives; False when it has just been."""
    with _leasing:
        held = leases.get(directory)
        if held is not None:
            if is_still(directory, held):
                return True
            os.close(leases.pop(directory))
        try:
            descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            return False
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        if not is_still(directory, descriptor):
            os.close(descriptor)
            return False
        leases[directory] = descriptor
        return True


def is_still(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False
