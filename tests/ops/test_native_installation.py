"""Installation without a compiler: everything but the native kernels works."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from .native_calls import run_script

ROOT = Path(__file__).parents[2]


def test_installation_without_a_compiler(tmp_path):
    """It succeeds: the kernels are missing, with the reason, and everything else works."""
    project = tmp_path / "project"
    project.mkdir()
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, project)
    shutil.copytree(
        ROOT / "src",
        project / "src",
        ignore=shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info"),
    )
    target = tmp_path / "target"
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--no-build-isolation",
        "--target",
        target,
        project,
    ]
    subprocess.run(
        [str(x) for x in command],
        check=True,
        capture_output=True,
        env=os.environ | {"CXX": "/nonexistent/c++"},
    )
    script = """
import torch, cumulant as cm
q, k, v = (torch.randn(1, 2, 30, 4) for _ in range(3))
print(cm.__file__)
print(cm.explain(cm.taylor_attention, q, k, v).impl, cm.taylor_attention(q, k, v).shape)
try:
    cm.taylor_attention(q, k, v, impl="native")
except ValueError as e:
    print(e)
"""
    done = run_script(script, PYTHONPATH=str(target), TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stderr
    where, chosen, message = done.stdout.splitlines()
    assert where.startswith(str(target))
    assert chosen == "torch torch.Size([1, 2, 30, 4])"
    assert (
        "its kernels were not compiled: no C++ compiler (GCC, Clang) when cumulant was installed"
        in message
    )
    assert "these work: 'torch', 'reference'" in message
