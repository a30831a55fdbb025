"""The README's examples run as they stand."""

import re
import subprocess
import sys
from pathlib import Path

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_examples_run():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    scope = {}
    exec(blocks[0], scope)
    assert scope["out"].shape == (1, 8, 1000, 64)
    exec(blocks[1], scope)
    assert scope["rest"].shape == (1, 8, 100, 64)
    exec(blocks[2], scope)
    assert scope["y"].shape == (1, 100, 512)
    exec(blocks[3], scope)
    assert scope["y"].shape == (2, 10, 512)
    assert round(scope["context"].nbytes / 1e6, 1) == 0.6
    assert scope["images"].shape == (2, 32, 24, 24)
    assert len(blocks) == 4


def test_the_first_screen_has_what_a_newcomer_needs():
    """It has a picture, an installation without CUDA, a call, and the two commands."""
    first = README.split("\n## ")[0]
    picture = re.search(r"!\[[^]]+\]\((docs/figures/[^)]+)\)", first)
    assert (Path(__file__).parent.parent / picture[1]).is_file()
    assert "whl/cpu" in first
    assert "3 to 4 GB" in first
    assert "```python\nimport torch" in first
    assert "make demo" in first
    assert "make test" in first


def test_the_programs_behind_the_commands_import():
    """`make demo` and the other examples find what they import, whatever is renamed."""
    paths = sorted(map(str, (Path(__file__).parents[1] / "examples").glob("*.py")))
    script = f"import runpy\nfor path in {paths}: runpy.run_path(path, run_name='imported')"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
