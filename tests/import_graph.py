"""Counts the imports between a package's modules, and finds those that go in circles.

python tests/import_graph.py [src/cumulant [bench]] prints the numbers for a package (and for a part
of it). Imports inside functions and under ``TYPE_CHECKING`` count. The tests use the same
functions.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

Graph = dict[str, set[str]]  # a module's name: the modules that it imports


def import_graph(root: Path) -> Graph:
    """The modules of the package at `root`, and their imports of one another."""
    paths = {_module_name(root, path): path for path in sorted(root.rglob("*.py"))}
    return {name: set(_imports(name, path, paths)) - {name} for name, path in paths.items()}


def _module_name(root: Path, path: Path) -> str:
    parts = [root.name, *path.relative_to(root).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(name: str, path: Path, known: dict[str, Path]) -> Iterator[str]:
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                target = f"{module}.{alias.name}"
                if target in known:
                    yield target
                elif module in known:
                    yield module


def import_circles(graph: Graph) -> list[list[str]]:
    """The groups of modules each of which leads to every other one by imports."""
    reached: dict[str, set[str]] = {}
    for start in graph:
        seen, left = set(), list(graph[start])
        while left:
            name = left.pop()
            if name not in seen:
                seen.add(name)
                left += graph[name]
        reached[start] = seen
    circles = {
        frozenset(b for b in reached[a] if a in reached[b]) for a in graph if a in reached[a]
    }
    return sorted(sorted(circle) for circle in circles)


def folder_graph(graph: Graph, part: str) -> Graph:
    """The imports between the folders and modules of the package `part`."""

    def inside(name: str) -> str | None:
        return name.removeprefix(f"{part}.").split(".")[0] if name.startswith(f"{part}.") else None

    found: Graph = {}
    for name, targets in graph.items():
        place = inside(name)
        if place is not None:
            found.setdefault(place, set()).update({inside(t) for t in targets} - {None, place})
    return found


def main() -> None:
    root = (
        Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "src" / "cumulant"
    )
    part = ".".join([root.name, *sys.argv[2:]])
    graph = import_graph(root)
    names = {name for name in graph if name == part or name.startswith(f"{part}.")}
    inside = {name: graph[name] & names for name in names}
    circles, folders = import_circles(inside), folder_graph(graph, part)
    print(
        f"{part}: {len(inside)} modules, {sum(map(len, inside.values()))} imports, {len(circles)}"
        " circles"
    )
    count = len(import_circles(folders))
    print(
        f"side by side: {len(folders)}, {sum(map(len, folders.values()))} imports, {count} circles"
    )
    for name, targets in sorted(folders.items()):
        print(f"  {name}: {', '.join(sorted(targets)) or '-'}")
    for circle in circles:
        print("circle:", ", ".join(circle))


if __name__ == "__main__":
    main()
