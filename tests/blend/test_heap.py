"""Freed memory stays in the process, unless the user has asked for something else."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from blend.heap import keep_freed_memory

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
# glibc's own threshold takes a first block of this size from the system and hands it back: the setting is the cause
KEPT_MIB = """
import resource, sys, torch
from pathlib import Path
from blend.heap import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() // 2**20
before = resident()
block = torch.ones(24 * 2**18)
assert resident() - before > 20
del block
print(resident() - before)
"""


@glibc
def test_memory_that_tensors_free_stays_for_the_next_ones():
    def kept(how: str) -> int:
        done = subprocess.run([sys.executable, "-c", KEPT_MIB, how], capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert kept("leave") < 4
    assert kept("keep") > 20


@glibc
def test_the_users_own_setting_stays(monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    assert not keep_freed_memory()
