"""Calls written for `scaled_dot_product_attention` get errors that name the difference."""

import inspect

import pytest
import torch

import cumulant as cm

from .cases import inputs

OPERATIONS = (cm.linear_attention, cm.taylor_attention, cm.gated_attention)


@pytest.mark.parametrize("op", OPERATIONS)
@pytest.mark.parametrize(
    ("name", "value", "hint"),
    [
        ("attn_mask", None, r"key_mask \[B, S\] \(boolean, True = attend\), or is_causal=True"),
        ("attention_mask", torch.ones(2, 37), "key_mask"),
        ("enable_gqa", True, "leave it out"),
        ("causal", True, "is_causal=True"),
        ("initial_state", None, "pass state"),
    ],
)
def test_names_of_other_libraries(op, name, value, hint):
    with pytest.raises(
        TypeError, match=rf"{op.__name__}\(\) got an unexpected keyword argument '{name}': .*{hint}"
    ):
        op(*inputs(), **{name: value})


def test_dropout_belongs_to_the_gated_operations():
    with pytest.raises(TypeError, match="'dropout_p': attention weights are not formed"):
        cm.linear_attention(*inputs(), dropout_p=0.0)
    cm.gated_attention(*inputs(), dropout_p=0.0)
    state = torch.zeros(2, 4, 3)
    with pytest.raises(TypeError, match=r"elita_attention\(\) got .* 'softmax_scale': pass scale"):
        cm.elita_attention(state, state, state, state[..., None], softmax_scale=1)
    with pytest.raises(
        TypeError, match=r"mixed_chunk_attention\(\) got .* 'output_final_state': pass return_state"
    ):
        cm.mixed_chunk_attention(*inputs(), *inputs()[:2], output_final_state=True)


def test_other_names_are_python_s_error():
    with pytest.raises(TypeError, match="unexpected keyword argument 'sacle'"):
        cm.linear_attention(*inputs(), sacle=1.0)


def test_a_mask_by_position():
    mask = torch.ones(37, 37, dtype=torch.bool)
    with pytest.raises(
        ValueError, match="order: expected an integer of at least 1, got a tensor; .* key_mask"
    ):
        cm.taylor_attention(*inputs(), mask)
    with pytest.raises(
        TypeError, match="feature_map: expected a name or a callable, got Tensor; .* key_mask"
    ):
        cm.linear_attention(*inputs(), mask)


def test_signatures_and_docstrings_stay():
    assert "feature_map" in inspect.signature(cm.linear_attention).parameters
    assert cm.taylor_attention.__name__ == "taylor_attention"
    assert "Taylor" not in (cm.linear_attention.__doc__ or "")


def test_heads_and_tokens_that_changed_places_show():
    """[B, T, H, D] where [B, H, T, D] is expected is an error."""
    x = torch.randn(2, 100, 8, 16)
    reason = cm.explain(cm.taylor_attention, x, x, x).reason
    assert reason.endswith("query read as B = 2 rows, H = 100 heads, T = 8 tokens")
    logits = torch.randn(2, 100, 8)
    assert (
        "H = 100 heads, T = 8" in cm.explain(cm.elita_attention, logits, logits, logits, x).reason
    )
    assert "quad_query read as B = 2" in cm.explain(cm.mixed_chunk_attention, x, x, x, x, x).reason
