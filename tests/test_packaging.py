"""The source distribution, the wheel's tag, and the build where no kernels can be compiled."""

import os
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import setuptools
from setuptools.errors import CompileError

from cumulant.kernels.native import library

ROOT = Path(__file__).parent.parent
LEFT_OUT = shutil.ignore_patterns(
    "*.so", "__pycache__", "*.egg-info", ".*_cache", ".hypothesis", "build", "dist"
)


@pytest.fixture
def project(tmp_path):
    """A copy of the project's folders, and of the files beside them."""
    copy = tmp_path / "project"
    copy.mkdir()
    for path in ROOT.iterdir():
        if path.name in (".ci", ".github", "src", "tests", "docs", "examples", "benchmarks"):
            shutil.copytree(path, copy / path.name, ignore=LEFT_OUT)
        elif (
            path.is_file()
            and path.name not in (".git", "PKG-INFO", "setup.cfg")
            and ".coverage" not in path.name
        ):
            shutil.copy(path, copy)
    return copy


def build(project, kind, **env):
    """One distribution of the project, built by its back end."""
    script = f"from setuptools import build_meta; build_meta.build_{kind}('dist')"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=project,
        capture_output=True,
        text=True,
        env=os.environ | env,
    )
    assert done.returncode == 0, done.stderr
    (made,) = (project / "dist").iterdir()
    return made, done.stdout + done.stderr


def test_the_source_distribution_holds_all_that_its_tests_need(project):
    wanted = {str(path.relative_to(project)) for path in project.rglob("*") if path.is_file()}
    assert {"Makefile", "constraints.txt", "tests/ops/cases.py", ".ci/run"} <= wanted
    made, _ = build(project, "sdist")
    with tarfile.open(made) as archive:
        found = {name.partition("/")[2] for name in archive.getnames()}
    assert not wanted - found
    assert not [name for name in found if name.endswith((".so", ".pyc"))]


@pytest.mark.skipif(sys.platform == "win32", reason="kernels are not built there")
def test_a_wheel_says_where_it_can_be_installed(project, tmp_path):
    """A wheel with kernels is for one platform and any Python 3, one without for any."""
    compiler = tmp_path / "c++"  # takes no time, unlike a real one
    compiler.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\necho library > "$2"\n')
    compiler.chmod(0o755)
    for command, platform, kernels in ((str(compiler), None, 1), ("/nonexistent/c++", "any", 0)):
        made, _ = build(project, "wheel", CXX=command)
        python, abi, where = made.stem.split("-")[2:]
        assert (python, abi) == ("py3", "none")
        assert where == platform if platform else where.startswith(("linux", "macosx"))
        with zipfile.ZipFile(made) as archive:
            assert sum(name.endswith("_kernels.so") for name in archive.namelist()) == kernels
        made.unlink()
        shutil.rmtree(project / "build")


def test_nothing_is_compiled_on_windows(monkeypatch):
    """The build goes on as it does without a compiler, and `native` says why it is missing."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    build_script = runpy.run_path("setup.py")
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(CompileError, match="not built on Windows"):
        build_script["compiler"]()
    assert library._load_library.__wrapped__() == (None, "its kernels are not built on Windows")


def test_metadata_for_an_index():
    tomllib = pytest.importorskip("tomllib")  # from Python 3.11 on
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {"Homepage", "Documentation", "Source", "Issues", "Changelog"} <= set(project["urls"])
    assert all(url.startswith("https://") for url in project["urls"].values())
    classifiers = project["classifiers"]
    assert not [
        line for line in classifiers if line.startswith("License")
    ]  # the license field says it
    oldest = project["requires-python"].removeprefix(">=")
    assert f"Programming Language :: Python :: {oldest}" in classifiers
