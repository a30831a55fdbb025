"""Linear and Taylor attention share arguments, which are declared twice and documented once."""

import inspect
import re

import pytest

from cumulant.nn import LinearAttention, TaylorAttention
from cumulant.nn.kernel_attention import KernelAttention


def parameters(kind):
    return inspect.signature(kind).parameters


def test_declarations_agree():
    """Names, types and defaults are the same, but for Taylor features a head is small."""
    linear, taylor = parameters(LinearAttention), parameters(TaylorAttention)
    for name in parameters(KernelAttention).keys() - {"head_dim"}:
        assert linear[name] == taylor[name], name


@pytest.mark.parametrize("kind", [LinearAttention, TaylorAttention])
def test_every_argument_is_documented(kind):
    """The class documents its own arguments, and `help` shows the shared ones at `__init__`."""
    text = f"{inspect.getdoc(kind)}\n{inspect.getdoc(kind.__init__)}"
    documented = set(re.findall(r"^    (\w+): ", text, re.MULTILINE))
    assert documented == set(parameters(kind))
