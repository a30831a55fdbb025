"""The examples in the docstrings run, and print what they say.

Each sees `torch`, the package as `cm`, and the names of its own module.
"""

import doctest
import importlib
import re
from pathlib import Path

import pytest
import torch

import cumulant as cm

SOURCE = Path(cm.__file__).parent
FILES = [path for path in sorted(SOURCE.rglob("*.py")) if ">>>" in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_examples(path):
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    module = importlib.import_module(".".join(parts).removesuffix(".__init__"))
    names = {**vars(module), "torch": torch, "cm": cm}
    runner, said = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE), []
    for test in doctest.DocTestFinder(exclude_empty=True).find(module, globs=names):
        runner.run(test, out=said.append)
    assert not runner.failures, "".join(said)
    assert runner.tries == len(
        re.findall(r"^ *>>> ", path.read_text(encoding="utf-8"), re.MULTILINE)
    )
