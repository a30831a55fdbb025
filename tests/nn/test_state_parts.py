"""A state with parts of another module gives one clear error, for one token and for more."""

from dataclasses import replace

import pytest
import torch

from cumulant import nn

from .common import MIXERS

CHANGES = {
    "a channel less": lambda part: part[..., 1:],
    "other rows": lambda part: torch.cat((part, part)),
    "a dimension more": lambda part: part[None],
    "a list": torch.Tensor.tolist,
    "nothing": lambda part: None,
    "integers": lambda part: part.long(),
    "elsewhere": lambda part: part.to("meta"),
}


def part_names(state):
    """The dotted names of a state's tensors."""
    return [name for name, part in state.tensors().items() if part.is_floating_point()]


def with_part(state, name, change):
    first, _, rest = name.partition(".")
    part = getattr(state, first)
    return replace(state, **{first: with_part(part, rest, change) if rest else change(part)})


def refuses(mixer, state):
    """A step and longer input give one line that names the argument."""
    for length in (1, 3):
        with pytest.raises((TypeError, ValueError), match=r"^state(\.mask)?: expected [^\n]*$"):
            mixer(torch.randn(2, length, mixer.dim), state=state, return_state=True)


@pytest.mark.parametrize("how", CHANGES)
@pytest.mark.parametrize("name", MIXERS)
@torch.no_grad()  # as in decoding, where one token may take a whole native step
def test_parts_are_checked(name, how):
    mixer = MIXERS[name]().eval()
    _, state = mixer(torch.randn(2, 4, mixer.dim), return_state=True)
    for part in part_names(state):
        refuses(mixer, with_part(state, part, CHANGES[how]))
    for length in (1, 3):
        mixer(torch.randn(2, length, mixer.dim), state=state, return_state=True)


PAIRS = {
    "other heads": (lambda: nn.SoftmaxAttention(24, 4), lambda: nn.SoftmaxAttention(24, 2)),
    "other groups": (
        lambda: nn.SoftmaxAttention(24, 4),
        lambda: nn.SoftmaxAttention(24, 4, num_kv_heads=2),
    ),
    "other head dim": (
        lambda: nn.SoftmaxAttention(24, 4),
        lambda: nn.SoftmaxAttention(24, 4, head_dim=8),
    ),
    "heads onto one": (lambda: nn.SoftmaxAttention(24, 4), lambda: nn.GatedAttentionUnit(24)),
    "another key dim": (
        lambda: nn.GatedAttentionUnit(24),
        lambda: nn.GatedAttentionUnit(24, query_key_dim=8),
    ),
    "another value dim": (
        lambda: nn.GatedAttentionUnit(24),
        lambda: nn.GatedAttentionUnit(24, expansion_factor=1),
    ),
    "a shift too few": (
        lambda: nn.TaylorAttention(24, 4),
        lambda: nn.TaylorAttention(24, 4, shift_tokens=True),
    ),
    "a shift too many": (
        lambda: nn.TaylorAttention(24, 4, shift_tokens=True),
        lambda: nn.TaylorAttention(24, 4),
    ),
    "a convolution too few": (
        lambda: nn.LinearAttention(24, 4),
        lambda: nn.LinearAttention(24, 4, conv_size=3),
    ),
    "a convolution too many": (
        lambda: nn.LinearAttention(24, 4, conv_size=3),
        lambda: nn.LinearAttention(24, 4),
    ),
    "more taps": (
        lambda: nn.GatedShortConvolution(24),
        lambda: nn.GatedShortConvolution(24, size=6),
    ),
    "other taps": (
        lambda: nn.LinearAttention(24, 4, conv_size=3),
        lambda: nn.LinearAttention(24, 4, conv_size=4),
    ),
    "another map": (lambda: nn.TaylorAttention(24, 4), lambda: nn.LinearAttention(24, 4)),
    "another order": (
        lambda: nn.TaylorAttention(24, 4, order=2),
        lambda: nn.TaylorAttention(24, 4, order=3),
    ),
    "other groups of tokens": (
        lambda: nn.MixedChunkAttention(24, group_size=4),
        lambda: nn.MixedChunkAttention(24, group_size=6),
    ),
    "a shift too many of mixed chunks": (
        lambda: nn.MixedChunkAttention(24, group_size=4, shift_tokens=True),
        lambda: nn.MixedChunkAttention(24, group_size=4),
    ),
    "other heads of logits": (lambda: nn.ElitaAttention(24, 4), lambda: nn.ElitaAttention(24, 2)),
}


@pytest.mark.parametrize("how", PAIRS)
@torch.no_grad()
def test_states_of_other_modules(how):
    one, other = (build().eval() for build in PAIRS[how])
    refuses(other, one(torch.randn(2, 4, 24), return_state=True)[1])


def test_a_shift_of_an_odd_number_of_channels():
    for mixer in (
        nn.MixedChunkAttention(7, shift_tokens=True),
        nn.LinearAttention(7, 1, shift_tokens=True),
    ):
        x = torch.randn(2, 5, 7)
        y, state = mixer(x[:, :3], return_state=True)
        rest, _ = mixer(x[:, 3:], state=state, return_state=True)
        torch.testing.assert_close(torch.cat((y, rest), 1), mixer(x))


def test_states_without_sums():
    mixer = nn.TaylorAttention(24, 4)
    _, state = mixer(torch.randn(2, 4, 24), return_state=True)
    refuses(mixer, replace(state, sums=[1]))
