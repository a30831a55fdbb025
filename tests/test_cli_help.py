"""First steps: help without torch, commands that need torch alone, and missing packages."""

import json
import subprocess
import sys

import pytest

import cumulant as cm

LOADED = """
import sys
sys.argv = ["cumulant", *{arguments!r}]
from cumulant.__main__ import main
try:
    main()
except SystemExit as end:
    print("LOADED", end.code, *sorted({{name.partition(".")[0] for name in sys.modules}}))
"""
ALONE = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {missing!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
sys.argv = ["cumulant", *{arguments!r}]
from cumulant.__main__ import main
main()
"""
TEXT = {"typer", "rich", "transformers", "tokenizers", "safetensors", "datasets", "accelerate",
"numpy", "matplotlib",
        "filelock", "tqdm", "click"}  # fmt: skip


def python(script):
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        [],
        ["--version"],
        *(
            [name, "--help"]
            for name in (
                "train",
                "evaluate",
                "generate",
                "quantize",
                "export",
                "compare",
                "recall",
                "report",
                "info",
                "bench",
            )
        ),
        ["bench", "accuracy", "--help"],
        ["fly"],
        ["train", "--preset", "gpt"],
    ],
)
def test_help_and_typing_mistakes_do_not_wait_for_torch(arguments):
    done = python(LOADED.format(arguments=arguments))
    _, code, *loaded = done.stdout.strip().splitlines()[-1].split()
    assert code == ("2" if arguments and arguments[-1] in ("fly", "gpt") else "0"), done.stderr
    assert not {"torch", "transformers", "numpy", "matplotlib"} & set(loaded)


def test_the_public_names_are_there_all_the_same():
    """In the command's own process they load when they are asked for."""
    script = "import sys; sys.argv = ['cumulant']; import cumulant; print('torch' in sys.modules); "
    script += (
        "print(*(cumulant.__name__ + '.' + n for n in cumulant.__all__ if getattr(cumulant, n) is"
        " not None)); "
    )
    script += "print(hasattr(cumulant, 'linear'))"
    done = python(script)
    assert done.stdout.splitlines() == [
        "False",
        " ".join(f"cumulant.{n}" for n in cm.__all__),
        "False",
    ], done.stderr


def test_anywhere_else_importing_loads_the_operators():
    """An exported program needs them, and names nothing of this package."""
    done = python("import cumulant, torch; print(torch.ops.cumulant)")
    assert done.returncode == 0
    assert (
        python("import cumulant, sys; print('cumulant.ops.linear' in sys.modules)").stdout.strip()
        == "True"
    )


def test_torch_alone():
    version = python(ALONE.format(missing=TEXT, arguments=["--version"]))
    assert (version.returncode, version.stdout) == (
        0,
        f"cumulant {cm.__version__}\n",
    ), version.stderr
    info = python(ALONE.format(missing=TEXT, arguments=["info"]))
    assert info.returncode == 0, info.stderr
    assert "impl native" in info.stdout
    found = json.loads(python(ALONE.format(missing=TEXT, arguments=["info", "--json"])).stdout)
    assert found["cumulant"] == cm.__version__


@pytest.mark.parametrize(
    ("missing", "arguments"),
    [
        (TEXT, ["--help"]),
        (TEXT, ["train"]),
        ({"rich"}, ["generate", "runs/x", "--prompt", "a"]),
        ({"transformers"}, ["generate", "runs/x", "--prompt", "a"]),
        ({"filelock"}, ["bench", "--quick", "--output", "/tmp/never"]),
        ({"torch"}, ["info"]),
    ],
)
def test_what_is_missing_is_one_line_that_names_the_extra(missing, arguments):
    done = python(ALONE.format(missing=missing, arguments=arguments))
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("cumulant: ")
    assert "is not installed, which this needs (pip install 'cumulant[text]'" in line
    assert any(f"cumulant: {name} is not" in line for name in missing)
