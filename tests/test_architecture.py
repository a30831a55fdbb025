"""Import rules, public names, and what `import cumulant` costs."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import cumulant as cm

from .import_graph import folder_graph, import_circles, import_graph

ROOT = Path(cm.__file__).parent
TESTS = Path(__file__).parent
# what each part may import from the package
ALLOWED = {
    "ops": {"ops", "kernels"},
    "kernels": set(),
    "nn": {"nn", "ops"},
    "models": {"models", "nn", "ops"},
    "interop": {"interop", "models", "nn", "ops"},
    "text": {"text", "models", "nn", "ops"},
    "export": {"export", "text", "models", "nn", "ops"},
    "serving": {"serving", "text", "models", "nn", "ops"},
    "bench": {"bench", "text", "models", "nn", "ops"},
}


def imports(path: Path) -> set[str]:
    """Absolute names of all modules of the package that a file imports, anywhere in it."""
    package = ["cumulant", *path.relative_to(ROOT).parent.parts]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names if name.name.startswith("cumulant")}
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                base = package[: len(package) - node.level + 1]
                module = ".".join([*base, *([node.module] if node.module else [])])
                found |= (
                    {module} if node.module else {f"{module}.{name.name}" for name in node.names}
                )
            elif node.module and node.module.startswith("cumulant"):
                found.add(node.module)
    return found


@pytest.mark.parametrize("part", ALLOWED)
def test_import_rules(part):
    shared = {
        "decay",
        "guarded",
        "product",
        "quantized",
        "spec",
        "transforms",
    }  # of kernels, which every implementation may know
    joints = {"backends", "operators"}  # which know the implementations
    for path in (ROOT / part).rglob("*.py"):
        for module in imports(path):
            names = module.split(".")
            target = names[1] if len(names) > 1 else ""
            if part == "kernels":  # implementations do not know one another
                own = path.relative_to(ROOT / "kernels").parts[0].removesuffix(".py")
                known = names[2:3] and (
                    names[2] in {own, *shared} or (own in joints and names[2] != "reference")
                )
                assert names[1] == "kernels", f"{path.relative_to(ROOT)} imports {module}"
                assert known, f"{path.relative_to(ROOT)} imports {module}"
            else:
                assert target in ALLOWED[part] | {"__version__"}, (
                    f"{path.relative_to(ROOT)} imports {module}"
                )


def test_no_import_circles():
    assert import_circles(import_graph(ROOT)) == []


def test_measurements_do_not_import_one_another():
    """In `bench`, a measurement's folder imports itself and the shared modules."""
    graph = folder_graph(import_graph(ROOT), "cumulant.bench")
    shared = {"reports", "dtypes", "console", "parsing"}
    measurements = {name for name in graph if (ROOT / "bench" / name).is_dir()} - shared
    assert measurements >= {"speed", "accuracy", "approximation", "recall", "compare"}
    for name in measurements:
        assert graph[name] <= shared, name
    assert graph["reports"] == set()
    assert graph["dtypes"] <= {"reports"}
    assert import_circles(graph) == []


@pytest.mark.parametrize(
    ("files", "circle"),
    [
        ({"a": "from . import b", "b": "def f():\n    from .a import x"}, ["p.a", "p.b"]),
        (
            {
                "a": "from .b import x",
                "b": "import typing\nif typing.TYPE_CHECKING:\n    from p import a",
            },
            ["p.a", "p.b"],
        ),
        (
            {"a": "import p.b", "b": "from .c import x", "c": "from p.a import y"},
            ["p.a", "p.b", "p.c"],
        ),
        ({"a": "from . import b", "b": "from .c import x", "c": ""}, None),
    ],
)
def test_circles_are_found(files, circle, tmp_path):
    (tmp_path / "p").mkdir()
    for name, text in {"__init__": "", **files}.items():
        (tmp_path / "p" / f"{name}.py").write_text(text)
    assert import_circles(import_graph(tmp_path / "p")) == ([circle] if circle else [])


def test_public_names():
    assert sorted(cm.__all__) == cm.__all__
    assert set(cm.__all__) == {
        "ElitaState",
        "KeyValueState",
        "LinearState",
        "MixedChunkState",
        "State",
        "__version__",
        "elita_attention",
        "explain",
        "feature_count",
        "gated_attention",
        "linear_attention",
        "load_state",
        "mixed_chunk_attention",
        "save_state",
        "taylor_attention",
    }
    assert all(hasattr(cm, name) for name in cm.__all__)


def test_signatures():
    """One order and one set of names over all operations."""
    common = ["key_mask", "cu_seqlens", "state", "return_state", "impl"]
    qkv, scaled = ["query", "key", "value"], ["is_causal", "scale"]
    five = ["quad_query", "quad_key", "lin_query", "lin_key", "value"]
    for op, own, first in (
        (cm.linear_attention, [*qkv, "feature_map"], scaled),
        (cm.taylor_attention, [*qkv, "order"], scaled),
        (cm.gated_attention, qkv, ["activation", "is_causal", "length_scale", "bias"]),
        (cm.elita_attention, ["key_logit", "query_logit", "self_logit", "value"], []),
        (cm.mixed_chunk_attention, five, ["group_size", "is_causal", "activation", "bias"]),
    ):
        parameters = inspect.signature(op).parameters
        positional = [n for n, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
        assert positional == own
        keywords = [n for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY]
        assert keywords[: len(first)] == first
        assert keywords[-5:] == common
        assert op is cm.elita_attention or parameters["is_causal"].default is False
        assert parameters["impl"].default == "auto"


def run(script: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout


def test_import_needs_only_torch():
    loaded = run(
        "import sys, torch; before = set(sys.modules); import cumulant; print(*(set(sys.modules) -"
        " before))"
    )
    roots = {name.split(".")[0] for name in loaded.split()}
    assert not roots & {
        "transformers",
        "triton",
        "safetensors",
        "einops",
        "typer",
        "rich",
        "datasets",
        "numpy",
    }
    foreign = {
        r for r in roots if r not in sys.stdlib_module_names and r != "cumulant" and r != "torch"
    }
    assert not foreign


def test_import_is_quick():
    """The median of three imports takes less than 0.3 seconds beside torch.

    Processor time is measured, which other programs on the machine do not lengthen.
    """
    script = (
        "import time, torch; t = time.process_time(); import cumulant; print(time.process_time()"
        " - t)"
    )
    times = sorted(float(run(script)) for _ in range(3))
    assert times[1] < 0.3


def test_files_and_functions_are_short():
    """A function's lines are counted without its docstring."""
    for path in (*ROOT.rglob("*.py"), *TESTS.rglob("*.py")):
        assert len(path.read_text().splitlines()) <= 400, path
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert code_lines(node) <= 60, f"{path}: {node.name}"


def code_lines(function):
    """How many lines a function has without its docstring."""
    first = function.body[0]
    documented = ast.get_docstring(function) is not None
    docstring = first.end_lineno - first.lineno + 1 if documented else 0
    return function.end_lineno - function.lineno + 1 - docstring


def test_nothing_unpickles():
    for path in ROOT.rglob("*.py"):
        text = path.read_text()
        assert "torch.load" not in text, path
        assert "pickle" not in text, path
