"""What the commands that train ask of glibc: freed memory stays in the process."""

import os
import subprocess
import sys

import pytest

from cumulant.malloc import keep_freed_memory

FAULTS = """
import resource, torch
from cumulant.malloc import keep_freed_memory
kept = keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24).sum()  # 64 MiB, which malloc takes from the system and gives back by default
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
# the first ones may leave a hole that is a little too small
print(int(kept), min(faults() for _ in range(8)))
"""
STARTED = """
import sys, cumulant.malloc
cumulant.malloc.keep_freed_memory = lambda: print("kept")
sys.argv = ["cumulant", *sys.argv[1:]]
from cumulant.__main__ import main
main()
"""


def run(script, *arguments, **variables):
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("MALLOC_", "GLIBC_TUNABLES", "CUMULANT_MALLOC"))
    }
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, env={**clean, **variables}
    ).stdout


def test_pages_are_taken_once():
    kept, faults = map(int, run(FAULTS).split())
    if not kept:
        pytest.skip("not glibc")
    assert faults < 1000  # of 16,384 pages of 4 KiB


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"),
        ("MALLOC_TOP_PAD_", "0"),
        ("CUMULANT_MALLOC", "system"),
    ],
)
def test_what_the_user_set_stays(name, value):
    assert run(FAULTS, **{name: value}).split()[0] == "0"
    assert not keep_freed_memory({name: value})


def test_other_systems(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not keep_freed_memory({})


@pytest.mark.parametrize(("command", "kept"), [("train", True), ("compare", True), ("info", False)])
def test_only_commands_that_train(command, kept):
    assert ("kept" in run(STARTED, command, "--help")) == kept


def test_importing_the_package_sets_nothing():
    script = "import cumulant, sys; print('cumulant.malloc' in sys.modules)"
    assert run(script).strip() == "False"
