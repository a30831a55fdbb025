"""A tiny recipe, with a text of its own."""

from dataclasses import replace

import pytest

from .comparisons import TINY


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    words = ["cat", "dog", "bat", "rat", "owl"]
    path.write_text(
        "".join(f"{i} of the {words[i * i % 5]}s sat on the {words[i % 4]};\n" for i in range(900))
    )
    return replace(TINY, data=str(path))
