"""Files for visitors name the versions and commands that the project has."""

import re
from pathlib import Path

import pytest
import yaml

import cumulant

ROOT = Path(__file__).parent.parent
PROJECT = (ROOT / "pyproject.toml").read_text()
CONTINUOUS = ROOT / ".github" / "workflows" / "ci.yml"
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
TEXTS = [
    *ROOT.glob("*.md"),
    *(ROOT / "docs").rglob("*.md"),
    *(ROOT / ".github").rglob("*.*"),
    ROOT / ".ci" / "run",
    ROOT / ".pre-commit-config.yaml",
]


def jobs():
    return yaml.safe_load(CONTINUOUS.read_text())["jobs"]


def test_continuous_integration_covers_what_is_declared():
    """`.ci/run` runs on every declared Python, the oldest PyTorch, Linux, macOS and Windows."""
    every, torch = (jobs()[name]["strategy"]["matrix"] for name in ("all", "torch"))
    assert every["python"] == re.findall(r'Python :: (3\.\d+)"', PROJECT)
    assert {"ubuntu", "macos", "windows"} <= {
        x["os"].split("-")[0] for x in (*every["include"], {"os": every["os"][0]})
    }
    oldest = re.search(r'"torch>=([\d.]+)', PROJECT)[1]
    assert re.fullmatch(rf"{re.escape(oldest)}(\.0)?", torch["torch"][0])
    assert ".ci/run" in [step.get("run") for step in jobs()["all"]["steps"]]


def test_continuous_integration_runs_what_the_readme_says():
    commands = [
        line for line in (ROOT / ".ci" / "run").read_text().splitlines() if line.startswith("make")
    ]
    assert commands == ["make check", "make test"]
    assert "make test " in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("path", [path for path in TEXTS if path.exists()], ids=lambda p: p.name)
def test_make_targets_exist(path):
    named = set(
        re.findall(r"(?:`|^|run: |\$ |&& )make ([a-z][a-z-]*)", path.read_text(), re.MULTILINE)
    )
    assert named <= TARGETS, f"{path.name} names {named - TARGETS}"


def test_hooks_are_tools_of_the_project():
    """Their versions are in one place, constraints.txt."""
    pinned = (ROOT / "constraints.txt").read_text()
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert {hook["id"] for hook in hooks} == {"ruff-format", "ruff-check", "mypy", "clang-format"}
    for hook in hooks:
        tool = hook["entry"].removeprefix(".venv/bin/").split()[0]
        assert f"\n{tool}==" in pinned
        assert f'"{tool}>=' in PROJECT


def test_citation():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["version"] == cumulant.__version__
    assert f'license = "{citation["license"]}"' in PROJECT
    assert citation["repository-code"] in PROJECT
