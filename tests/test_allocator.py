"""Freed memory stays with the process where the C library can be told so."""

import platform
import subprocess
import sys

import pytest

from conftest import ROOT

FAULTS = """
import resource, sys
import torch
from allocator import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
for _ in range(3):  # 200 MB in ten pieces, made, used and freed
    pieces = [torch.zeros(5_000_000) for _ in range(10)]
    del pieces
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
pieces = [torch.zeros(5_000_000) for _ in range(10)]
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_memory_that_is_kept_is_not_asked_for_again():
    faults = {}
    for how in ("keep", "leave"):
        done = subprocess.run(
            [sys.executable, "-c", FAULTS, how], cwd=ROOT, capture_output=True, text=True,
            check=True,
        )
        faults[how] = int(done.stdout)
    if faults["leave"] == 0:
        pytest.skip("this system does not count page faults")
    assert faults["keep"] < 10_000  # pages of 4 KiB; 200 MB have 50,000
    assert faults["leave"] > 3 * faults["keep"]
