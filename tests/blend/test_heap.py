"""Freed memory stays in the process, unless the user has asked for something else."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from blend.heap import keep_freed_memory

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
# what glibc hands back by default: the setting must be the cause
FAULTS = """
import resource, sys, torch
from blend.heap import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def work():
    held = [torch.zeros(2**18) for _ in range(24)]
for _ in range(3):
    work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@glibc
def test_memory_that_tensors_free_is_used_again_without_page_faults():
    def faults(how: str) -> int:
        done = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert faults("keep") < 100 < faults("leave")


@glibc
def test_the_users_own_setting_stays(monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    assert not keep_freed_memory()
