"""The README's examples run as they stand."""

import re
from pathlib import Path


def test_the_examples_run():
    text = (Path(__file__).parent.parent / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    scope = {}
    exec(blocks[0], scope)
    assert scope["out"].shape == (1, 8, 1000, 64)
    scope["x"], scope["more"] = (scope["torch"].randn(1, n, 512) for n in (5, 2))
    exec(blocks[1], scope)
    assert scope["mixer"](scope["more"], state=scope["state"], return_state=True)[0].shape == (1, 2, 512)
    exec(blocks[2], scope)
    assert scope["y"].shape == (2, 10, 512)
    assert round(scope["context"].nbytes / 1e6, 1) == 0.6
    assert scope["images"].shape == (2, 32, 24, 24)
    assert len(blocks) == 3
