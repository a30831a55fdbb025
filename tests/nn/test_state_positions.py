"""Positions of a module's state that do not fit are refused, at any depth."""

from dataclasses import fields, replace

import pytest
import torch

from cumulant import nn

from .common import MIXERS

WRONG = {
    "float": (
        torch.Tensor.float,
        TypeError,
        r"state: expected position \[B\] int64 = \[2\] on cpu, got \[2\] float32",
    ),
    "int32": (
        torch.Tensor.int,
        TypeError,
        r"state: expected position \[B\] int64 = \[2\] on cpu, got \[2\] int32",
    ),
    "elsewhere": (
        lambda p: p.to("meta"),
        TypeError,
        r"state: expected position .* on cpu, got one on meta",
    ),
    "longer": (
        lambda p: torch.cat((p, p)),
        ValueError,
        r"state: expected 2 rows, as x has, got 4; choose rows",
    ),
    "shorter": (
        lambda p: p[:1],
        ValueError,
        r"state: expected 2 rows, as x has, got 1; choose rows",
    ),
    "number": (
        lambda p: p[0],
        ValueError,
        r"state: expected position \[B\] int64 = \[2\] on cpu, got \[\]",
    ),
    "list": (
        torch.Tensor.tolist,
        TypeError,
        r"state: expected position \[B\] int64 = \[2\] on cpu, got list",
    ),
}


def with_position(state, change):
    """A copy of the state with another position, which may be in a state inside it."""
    for field in fields(state):
        part = getattr(state, field.name)
        if field.name == "position":
            return replace(state, position=change(part))
        if hasattr(part, "position"):
            return replace(state, **{field.name: with_position(part, change)})
    raise AssertionError(f"{type(state).__name__} has no position")


@pytest.mark.parametrize("how", WRONG)
@pytest.mark.parametrize("name", MIXERS)
@torch.no_grad()  # as in decoding, where one token may take a whole native step
def test_positions_are_checked(name, how):
    mixer, (change, kind, message) = MIXERS[name]().eval(), WRONG[how]
    _, state = mixer(torch.randn(2, 4, mixer.dim), return_state=True)
    for length in (1, 3):
        x = torch.randn(2, length, mixer.dim)
        with pytest.raises(kind, match=message):
            mixer(x, state=with_position(state, change), return_state=True)
        assert mixer(x, state=state, return_state=True)[1].position.tolist() == [4 + length] * 2


@pytest.mark.parametrize(
    "mask", [torch.ones(2, 4), torch.ones(2, 3).bool()], ids=["numbers", "short"]
)
def test_masks_of_kept_keys(mask):
    mixer = nn.SoftmaxAttention(8, 2)
    _, state = mixer(torch.randn(2, 4, 8), return_state=True)
    with pytest.raises((TypeError, ValueError), match=r"state.mask: expected "):
        mixer(torch.randn(2, 1, 8), state=replace(state, mask=mask), return_state=True)
