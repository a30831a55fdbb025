"""Native mixed chunk attention with groups longer than a block of the kernels."""

from __future__ import annotations

import pytest
import torch

import cumulant as cm
from cumulant.kernels.native import library
from cumulant.ops.state import MixedChunkState

from .cases import TOLERANCE, error
from .native_calls import gradients

pytestmark = pytest.mark.usefixtures("small_grains")


def groups_of_a_hundred(rows: int, tokens: int, dtype: torch.dtype, monkeypatch, name: str):
    """Arguments of `mixed_chunk_attention` whose groups are longer than a block of the kernels."""
    if not library.loaded_library().cumulant_supports(library.INSTRUCTIONS.index(name)):
        pytest.skip(f"this machine has no {name}")
    monkeypatch.setattr(library, "instruction_set_name", lambda: name)
    torch.set_num_threads(4)  # twice the heads of one row: its columns are shared out, too
    torch.manual_seed(0)
    H, G, K, L, V, size = 4, 2, 17, 19, 150, 100
    shapes = (H, K), (G, K), (H, L), (G, L), (G, V)
    tensors = [torch.rand(rows, heads, tokens, width).to(dtype) for heads, width in shapes]
    mask = torch.ones(rows, tokens, dtype=torch.bool)
    mask[1:] = torch.rand(rows - 1, tokens) > 0.3
    bias = torch.rand(H if rows == 1 else 1, size, size).to(dtype)
    options = {
        "group_size": size,
        "is_causal": True,
        "activation": "laplace" if rows == 1 else "relu2",
    }
    return tensors, mask, bias, options


@pytest.mark.usefixtures("kept_threads", "unwritten_is_nan")
@pytest.mark.parametrize("name", library.INSTRUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 2], ids=["even", "masked"])
def test_steps_through_groups_longer_than_a_block(name, dtype, rows, monkeypatch):
    """Single tokens join open groups; one row of two lacks tokens, so that its group differs."""
    tensors, mask, bias, options = groups_of_a_hundred(rows, 209, dtype, monkeypatch, name)
    exact = [x.double() for x in tensors]
    state = cm.mixed_chunk_attention(*(x[:, :, :0] for x in tensors), **options, return_state=True)[
        1
    ]
    for t in range(mask.shape[1]):
        token = [x[:, :, t : t + 1] for x in tensors]
        seen = {"bias": bias, "state": state} | (
            {} if rows == 1 else {"key_mask": mask[:, t : t + 1]}
        )
        out, state = cm.mixed_chunk_attention(
            *token, **options, **seen, return_state=True, impl="native"
        )
        if t % 9 == 0 or t % 100 > 97:
            so_far, seen = (
                [x[:, :, : t + 1] for x in exact],
                {
                    "bias": bias.double(),
                    "key_mask": mask[:, : t + 1],
                },
            )
            whole, past = cm.mixed_chunk_attention(
                *so_far, **options, **seen, return_state=True, impl="reference"
            )
            assert error(out, whole[:, :, -1:]) < 5 * TOLERANCE[dtype]
            for part, expected in past.tensors().items():
                assert error(getattr(state, part), expected) < 5 * TOLERANCE[dtype]


@pytest.mark.usefixtures("kept_threads", "unwritten_is_nan")
@pytest.mark.parametrize("name", library.INSTRUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 2], ids=["even", "masked"])
@pytest.mark.parametrize("tokens", [1, 3, 120])
def test_onto_groups_more_than_a_block_full(name, dtype, rows, tokens, monkeypatch):
    """Results are right where whole blocks of a group have no queries."""
    tensors, mask, bias, options = groups_of_a_hundred(rows, 97 + tokens, dtype, monkeypatch, name)
    early, late = ([x[:, :, part] for x in tensors] for part in (slice(97), slice(97, None)))
    state = cm.mixed_chunk_attention(
        *early, **options, bias=bias, key_mask=mask[:, :97], return_state=True
    )[1]
    results = []
    for impl, wide in (("native", False), ("reference", True)):
        parts = [*late, bias, *(x for x in state.tensors().values() if x.is_floating_point())]
        leaves = [(x.double() if wide else x).detach().clone().requires_grad_() for x in parts]
        past = MixedChunkState(*leaves[6:], state.position)
        seen = {"bias": leaves[5], "key_mask": mask[:, 97:], "state": past}
        out, after = cm.mixed_chunk_attention(
            *leaves[:5], **options, **seen, return_state=True, impl=impl
        )
        found = [out, *(x for x in after.tensors().values() if x.is_floating_point())]
        results.append((found, gradients(found, leaves)))
    for actual, wanted in zip(*(outs for outs, _ in results)):
        assert error(actual, wanted) < 5 * TOLERANCE[dtype]
    for actual, wanted in zip(*(grads for _, grads in results)):
        assert error(actual, wanted) < 20 * TOLERANCE[dtype]


@pytest.mark.usefixtures("unwritten_is_nan")
@pytest.mark.parametrize(("H", "V"), [(2, 0), (0, 5)], ids=["no values", "no heads"])
def test_states_of_nothing_to_attend(H, V):
    tokens = [torch.rand(1, h, 3, d) for h, d in ((H, 3), (1, 3), (H, 2), (1, 2), (1, V))]
    found = {}
    for impl in ("auto", "reference"):
        options = {"group_size": 8, "is_causal": True, "return_state": True, "impl": impl}
        _, state = cm.mixed_chunk_attention(*tokens, **options)
        found[impl] = cm.mixed_chunk_attention(
            *(x[:, :, :1] for x in tokens), state=state, **options
        )[1].tensors()
    assert all(
        torch.equal(found["auto"][name], wanted) for name, wanted in found["reference"].items()
    )
