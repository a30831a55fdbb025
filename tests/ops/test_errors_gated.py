"""Bad input of gated and mixed chunk attention, told as other operations tell it."""

import pytest
import torch

import cumulant as cm

from .arguments import long, mixed_arguments, wide
from .cases import inputs


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"query": wide(2, 4, 5)}, ValueError, r"query: expected \[B, H, T, K\], got \[2, 4, 5\]"),
        ({"activation": "relu"}, ValueError,
         r"activation: expected one of 'relu2', 'laplace', got 'relu'"),
        ({"length_scale": 0}, ValueError,
         r"length_scale: expected a positive number or a tensor, got 0"),
        ({"length_scale": -3.0}, ValueError,
         r"length_scale: expected a positive number or a tensor, got -3.0"),
        ({"length_scale": "total"}, ValueError,
         r"length_scale: expected a positive number or a tensor, got 'total'"),
        ({"length_scale": torch.ones(1, 1, requires_grad=True)}, ValueError,
         r"length_scale: no gradient reaches it; to learn a scale"),
        ({"length_scale": wide(2, 5)}, ValueError,
         r"length_scale: expected a number or \[B or 1, T or 1\] with B=2, T=37, got \[2, 5\]"),
        ({"bias": wide(37)}, ValueError,
         r"bias: expected \[T, S\], \[H, T, S\] or \[B, H, T, S\] = \[37, 37\] or .* got \[37\]"),
        ({"bias": wide(3, 37, 37)}, ValueError,
         r"bias: expected .* = .*\[4, 37, 37\].* got \[3, 37, 37\]"),
        ({"bias": long(37, 37)}, TypeError,
         r"bias: expected a floating tensor .* on cpu, got torch.int64 on cpu"),
        ({"bias": 3.0}, TypeError, r"bias: expected a floating tensor .* got float"),
        ({"dropout_p": 1.0}, ValueError, r"dropout_p: expected a probability below 1, got 1.0"),
        ({"key_mask": torch.ones(2, 36).bool()}, ValueError,
         r"key_mask: expected \[B, S\] = \[2, 37\], got \[2, 36\]"),
        ({"return_state": True, "is_causal": False}, ValueError,
         r"state: only causal gated attention carries a state; pass is_causal=True"),
        ({"state": (1, 2)}, TypeError,
         r"state: expected a KeyValueState from return_state=True, got tuple"),
        ({"impl": "triton"}, ValueError, r"impl: 'triton' cannot run this call"),
    ],
)  # fmt: skip
def test_gated_attention(change, kind, message):
    arguments = dict(zip(("query", "key", "value"), inputs())) | {"is_causal": True} | change
    with pytest.raises(kind, match=message):
        cm.gated_attention(**arguments)
    with pytest.raises(kind, match=message):
        cm.explain(cm.gated_attention, **arguments)


def test_gated_attention_does_not_pack_states():
    q, k, v = inputs(1)
    with pytest.raises(
        ValueError, match=r"cu_seqlens: a state of gated attention grows with each sequence"
    ):
        cm.gated_attention(
            q, k, v, is_causal=True, cu_seqlens=torch.tensor([0, 37]), return_state=True
        )
    with pytest.raises(ValueError, match=r"key: causal attention needs as many keys as queries"):
        cm.gated_attention(*inputs(T=3, S=9), is_causal=True)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"quad_query": wide(2, 4, 5)}, ValueError,
         r"quad_query: expected \[B, H, T, K\], got \[2, 4, 5\]"),
        ({"quad_key": wide(2, 2, 37, 6)}, ValueError,
         r"quad_key: expected \[B, G, S, K\] with B=2, K=5 as in quad_query, got \[2, 2, 37, 6\]"),
        ({"lin_key": wide(2, 2, 37, 6)}, ValueError,
         r"lin_key: expected \[B, G, S, K\] with B=2, K=5 as in lin_query, got"),
        ({"lin_key": wide(2, 2, 37, 5, dtype=torch.float32)}, TypeError,
         r"lin_key: expected lin_query's dtype and device, torch.float64 on cpu, got "
         r"torch.float32"),
        ({"lin_query": wide(2, 2, 37, 5)}, ValueError,
         r"lin_query: expected \[B, H, T, K\] = \[2, 4, 37, K\] as quad_query"),
        ({"value": wide(2, 2, 36, 3)}, ValueError,
         r"value: expected \[B, G, S, V\] = \[2, 2, 37, V\] as in quad_key, got \[2, 2, 36, 3\]"),
        ({"group_size": 0}, ValueError,
         r"group_size: expected an integer of at least 1 token, got 0"),
        ({"group_size": -4}, ValueError,
         r"group_size: expected an integer of at least 1 token, got -4"),
        ({"group_size": 2.5}, ValueError,
         r"group_size: expected an integer of at least 1 token, got 2.5"),
        ({"activation": "softmax"}, ValueError,
         r"activation: expected one of 'relu2', 'laplace', got 'softmax'"),
        ({"bias": wide(37, 37)}, ValueError,
         r"bias: expected \[g, g\] or \[H, g, g\] = \[8, 8\] or \[1, 8, 8\] or \[4, 8, 8\], got "
         r"\[37, 37\]"),
        ({"bias": wide(3, 8, 8)}, ValueError, r"bias: expected .* got \[3, 8, 8\]"),
        ({"bias": long(8, 8)}, TypeError,
         r"bias: expected a floating tensor \[g, g\] or \[H, g, g\] on cpu, got torch.int64"),
        ({"dropout_p": -0.1}, ValueError, r"dropout_p: expected a probability below 1, got -0.1"),
        ({"key_mask": torch.ones(2, 37)}, TypeError,
         r"key_mask: expected a boolean tensor \[B, S\], True = attend, got torch.float32"),
        ({"cu_seqlens": torch.tensor([0, 37])}, ValueError,
         r"cu_seqlens: packed sequences need B = 1"),
        ({"return_state": True, "is_causal": False}, ValueError,
         r"state: only causal mixed chunk attention carries a state; pass is_causal=True"),
        ({"state": (1, 2)}, TypeError,
         r"state: expected a MixedChunkState from return_state=True, got tuple"),
        ({"impl": "native", "dropout_p": 0.1}, ValueError,
         r"impl: 'native' cannot run this call: its kernels have no dropout; these work: 'torch'"),
    ],
)  # fmt: skip
def test_mixed_chunk_attention(change, kind, message):
    arguments = mixed_arguments() | {"is_causal": True, "group_size": 8} | change
    with pytest.raises(kind, match=message):
        cm.mixed_chunk_attention(**arguments)
    with pytest.raises(kind, match=message):
        cm.explain(cm.mixed_chunk_attention, **arguments)


def test_mixed_chunks_attend_to_themselves():
    arguments = mixed_arguments() | {
        name: x for name, x in mixed_arguments(30).items() if "key" in name or name == "value"
    }
    with pytest.raises(
        ValueError,
        match=(
            r"quad_key: mixed chunk attention is over the queries' own tokens \(S = T\), got T=37,"
            r" S=30"
        ),
    ):
        cm.mixed_chunk_attention(**arguments)


def test_states_of_another_group_size_or_dtype():
    _, state = cm.mixed_chunk_attention(
        **mixed_arguments(), group_size=8, is_causal=True, return_state=True
    )
    with pytest.raises(
        ValueError,
        match=r"state: expected quad_key \[2, 2, 16, 5\], got \[2, 2, 8, 5\]; .* group size",
    ):
        cm.mixed_chunk_attention(**mixed_arguments(), group_size=16, is_causal=True, state=state)
    with pytest.raises(
        TypeError, match=r"state: expected torch.float32 on cpu, got torch.float64 on cpu"
    ):
        cm.mixed_chunk_attention(
            **{name: x.float() for name, x in mixed_arguments().items()},
            group_size=8,
            is_causal=True,
            state=state,
        )


@pytest.mark.filterwarnings("ignore")
def test_a_group_bias_is_checked_in_compiled_graphs_too():
    run = torch.compile(
        lambda bias: cm.mixed_chunk_attention(**mixed_arguments(), group_size=8, bias=bias),
        backend="eager",
    )
    with pytest.raises(Exception, match=r"bias: expected \[g, g\] or \[H, g, g\] = \[8, 8\]"):
        run(wide(16, 16))


def test_a_packed_bias_covers_the_longest_sequence():
    q, k, v = inputs(1)
    bounds, bias = torch.tensor([0, 10, 37]), torch.randn(37, 37, dtype=torch.float64)
    whole = cm.gated_attention(q, k, v, bias=bias, cu_seqlens=bounds)
    assert torch.equal(whole, cm.gated_attention(q, k, v, bias=bias[:27, :27], cu_seqlens=bounds))
    with pytest.raises(ValueError, match=r"bias: expected .* = \[27, 27\] or .* got \[26, 26\]"):
        cm.gated_attention(q, k, v, bias=bias[:26, :26], cu_seqlens=bounds)
