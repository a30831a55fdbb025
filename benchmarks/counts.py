"""Counts of the code itself: lengths, and the places that a new argument or implementation touches.

    python benchmarks/counts.py [ROOT]

ROOT is a checkout, by default this one. The Python calls of a token are counted in the package that
is imported, so run it with ROOT/src first in PYTHONPATH. The last line is JSON.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

OTHER_OPERATIONS = (
    "bilinear",
    "elita",
    "gated",
    "mixed",
    "recurrence",
    "reference_",
    "taylor",
    "weights",
)
# Functions that handle masks alone, or another operation. No other argument would be added there.
OF_MASKS = (
    *("mask", "load_mask", "count_tokens", "softmax_features"),
    *("_clear", "_zero_masked_tokens"),  # the former name and the present one
)
OF_OTHERS = ("mixed_chunk_attention", "elita_attention", "sliding_window_attention")
IMPLEMENTATIONS = (
    "native",
    "torch",
    "chunked",
)  # the last is the former name of torch's folder


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def body_lines(function: ast.FunctionDef) -> int:
    """Lines of a function without its docstring."""
    assert function.end_lineno is not None
    lines = function.end_lineno - function.lineno + 1
    first = function.body[0]
    if (
        isinstance(first, ast.Expr)
        and isinstance(first.value, ast.Constant)
        and isinstance(first.value.value, str)
    ):
        assert first.end_lineno is not None
        lines -= first.end_lineno - first.lineno + 1
    return lines


def argument_sites(package: Path, name: str = "key_mask") -> list[str]:
    """Declarations of a tensor argument of linear attention.

    They are parameters and fields of tuples and structs. A new argument of the keys would be
    declared wherever `key_mask` is.
    """
    paths = [
        *package.glob("ops/*.py"),
        *package.glob("kernels/**/*.py"),
        *package.glob("kernels/**/*.?pp"),
    ]
    paths += [package / "nn" / "kernel_attention.py", package / "nn" / "linear.py"]
    found = []
    for path in sorted(paths):
        if any(other in path.name for other in OTHER_OPERATIONS) or path.name in (
            "__init__.py",
            "checks.py",
        ):
            continue
        text, at = path.read_text(), str(path.relative_to(package))
        if path.suffix != ".py":
            declared = re.findall(rf"^  [\w ]+\*? ?{name};|FIELD\({name}\)", text, re.MULTILINE)
            found += [at] * len(declared)
            continue
        tree = ast.parse(text)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.name not in (*OF_MASKS, *OF_OTHERS):
                arguments = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
                found += [f"{at}: {node.name}"] * sum(a.arg == name for a in arguments)
            elif isinstance(node, ast.ClassDef):
                fields = (part.target for part in node.body if isinstance(part, ast.AnnAssign))
                own = not any(other in node.name.lower() for other in OTHER_OPERATIONS)
                found += [f"{at}: {node.name}"] * (
                    own and any(isinstance(f, ast.Name) and f.id == name for f in fields)
                )
                found += [f"{at}: {node.name}"] * ast.unparse(node).count(f"'{name}'")
    return found


def implementation_files(package: Path) -> list[str]:
    """Files outside the implementations' folders that name two of them.

    A new implementation would have to be named in them too.
    """
    folders = {name: package / "kernels" / name for name in IMPLEMENTATIONS}
    found = []
    for path in sorted([*package.glob("ops/*.py"), *package.glob("kernels/**/*.py")]):
        if any(folder in path.parents for folder in folders.values()):
            continue
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):  # documentation may name them
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
                node
            ):
                node.body[0] = ast.Pass()
        text = ast.unparse(tree)
        named = {
            name for name in IMPLEMENTATIONS if re.search(rf"'{name}'|kernels\.{name}\b", text)
        }
        if len(named - ({"chunked"} if "torch" in named else set())) > 1:
            found.append(str(path.relative_to(package)))
    return found


def glue_lines(package: Path) -> int:
    """Lines between the operations and the implementations: schemas, fake kernels, gradients."""
    lines = 0
    for path in package.glob("kernels/**/*.py"):
        tree = ast.parse(path.read_text())
        if "operators" in path.parts:
            lines += len(path.read_text().splitlines())
            continue
        for node in tree.body:
            text = ast.unparse(node)
            glue = isinstance(node, ast.FunctionDef) and (
                node.name in ("_save", "_differentiate", "_") or "custom_op(" in text
            )
            if glue or "mappable(" in text or "register_autograd" in text or "custom_op(" in text:
                lines += node.end_lineno - node.lineno + 1  # type: ignore[operator]
    return lines


def token_calls() -> dict[str, int]:
    """Python calls of one token through two Taylor mixers, and through a model of two layers."""
    import torch
    from transformers import DynamicCache

    from cumulant.models import CumulantForCausalLM, from_preset
    from cumulant.nn import TaylorAttention

    mixers, x = [TaylorAttention(32, 4) for _ in range(2)], torch.randn(1, 6, 32)
    config = from_preset("taylor", vocab_size=50, hidden_size=32, num_hidden_layers=2)
    model, ids = CumulantForCausalLM(config).eval(), torch.randint(50, (1, 20))
    cache = DynamicCache(config=config)
    with torch.inference_mode():
        states = [mixer(x, return_state=True)[1] for mixer in mixers]
        model(input_ids=ids[:, :5], past_key_values=cache)

        def step_mixers(t: int) -> None:
            for mixer, state in zip(mixers, states, strict=True):
                mixer(x[:, :1], state=state, return_state=True)

        def step_model(t: int) -> None:
            model(input_ids=ids[:, t : t + 1], past_key_values=cache)

        return {"two mixers": _calls(step_mixers), "two layers of a model": _calls(step_model)}


def _calls(run: Any) -> int:
    seen = 0

    def note(frame: Any, event: str, argument: Any) -> None:
        nonlocal seen
        seen += event == "call"

    for t in range(5, 8):
        run(t)
    sys.setprofile(note)
    try:
        run(8)
    finally:
        sys.setprofile(None)
    return seen - 1  # `run` itself


def counts(root: Path) -> dict[str, Any]:
    package = root / "src" / "cumulant"
    sites = argument_sites(package)
    python = [p.read_text() for p in package.rglob("*.py")]
    cpp = [p.read_text() for p in package.rglob("*.?pp")]
    every = [f for text in python for f in functions(ast.parse(text))]
    return {
        "sites of a new tensor argument": len(sites),
        "files of a new tensor argument": len({site.split(":")[0] for site in sites}),
        "files of a new implementation": len(implementation_files(package)),
        "glue lines": glue_lines(package),
        "functions above 60 lines": sum(body_lines(f) > 60 for f in every),
        "lines above 100 columns, Python": sum(
            len(line) > 100 for text in python for line in text.splitlines()
        ),
        "lines above 100 columns, C++": sum(
            len(line) > 100 for text in cpp for line in text.splitlines()
        ),
    }


def main() -> None:
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1]
    found = {
        **counts(root),
        **{f"Python calls a token, {name}": n for name, n in token_calls().items()},
    }
    for site in argument_sites(root / "src" / "cumulant"):
        print("argument:", site)
    for path in implementation_files(root / "src" / "cumulant"):
        print("implementation:", path)
    for name, count in found.items():
        print(f"{name:40} {count}")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
