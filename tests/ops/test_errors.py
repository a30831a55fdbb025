"""Bad input: every message names the argument, what was expected and what came."""

import pytest
import torch

import cumulant as cm

from .arguments import long
from .cases import inputs

OPS = [cm.taylor_attention, cm.linear_attention]
by_op = pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)


@by_op
@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"query": torch.zeros(2, 4, 5)}, ValueError,
         r"query: expected \[B, H, T, K\], got \[2, 4, 5\]; heads are the second"),
        ({"query": [1, 2]}, TypeError, r"query: expected a tensor \[B, H, T, K\], got list"),
        ({"query": long(2, 4, 37, 5)}, TypeError,
         r"query: expected fp16, bf16, fp32 or fp64, got torch.int64"),
        ({"key": torch.zeros(2, 2, 37, 5)}, TypeError,
         r"key: expected query's dtype and device, torch.float64 on cpu, got torch.float32 on "
         r"cpu; convert with key.to\(query\)"),
        ({"key": torch.zeros(2, 2, 37, 6).double()}, ValueError,
         r"key: expected \[B, G, S, K\] with B=2, K=5 as in query, got \[2, 2, 37, 6\]"),
        ({"key": torch.zeros(1, 2, 37, 5).double()}, ValueError, r"key: expected .* with B=2"),
        ({"key": torch.zeros(2, 3, 37, 5).double(), "value": torch.zeros(2, 3, 37, 3).double()},
         ValueError,
         r"key: the 3 key/value heads \(G\) must divide the 4 query heads \(H\)"),
        ({"value": torch.zeros(2, 2, 36, 3).double()}, ValueError,
         r"value: expected \[B, G, S, V\] = \[2, 2, 37, V\] as in key, got \[2, 2, 36, 3\]"),
        ({"value": torch.zeros(2, 4, 37, 3).double()}, ValueError,
         r"value: expected .* = \[2, 2, 37, V\]"),
        ({"key_mask": torch.ones(2, 37)}, TypeError,
         r"key_mask: expected a boolean tensor \[B, S\], True = attend, got torch.float32; try "
         r"key_mask.bool\(\)"),
        ({"key_mask": torch.ones(2, 36).bool()}, ValueError,
         r"key_mask: expected \[B, S\] = \[2, 37\], got \[2, 36\]"),
        ({"key_mask": "all"}, TypeError, r"key_mask: expected a boolean tensor .* got str"),
        ({"cu_seqlens": torch.tensor([0, 37])}, ValueError,
         r"cu_seqlens: packed sequences need B = 1 .* got B=2"),
        ({"cu_seqlens": torch.tensor([0.0, 37.0])}, TypeError,
         r"cu_seqlens: expected an int32 or int64 tensor \[N \+ 1\], got torch.float32"),
        ({"cu_seqlens": torch.tensor([0])}, ValueError,
         r"cu_seqlens: expected \[N \+ 1\] with N >= 1 sequences, got \[1\]"),
        ({"impl": "cuda"}, ValueError,
         r"impl: expected 'auto', 'reference', 'torch', 'native' or 'triton', got 'cuda'"),
        ({"state": (1, 2)}, TypeError,
         r"state: expected a LinearState from return_state=True, got tuple"),
    ],
)  # fmt: skip
def test_arguments(op, change, kind, message):
    arguments = dict(zip(("query", "key", "value"), inputs())) | {"is_causal": True} | change
    with pytest.raises(kind, match=message):
        op(**arguments)
    with pytest.raises(kind, match=message):  # explain checks as the call does
        cm.explain(op, **arguments)


@by_op
def test_causal_needs_as_many_keys_as_queries(op):
    with pytest.raises(
        ValueError,
        match=r"key: causal attention needs as many keys as queries \(S = T\), got T=3, S=9",
    ):
        op(*inputs(T=3, S=9), is_causal=True)


@by_op
@pytest.mark.parametrize("bounds", [[1, 5], [0, 6, 4], [0, 40]])
def test_offsets(op, bounds):
    with pytest.raises(
        ValueError, match=r"cu_seqlens: expected offsets rising from 0 to at most T=37, got \["
    ):
        op(*inputs(1), is_causal=True, cu_seqlens=torch.tensor(bounds))


@by_op
def test_states_of_another_call(op):
    q, k, v = inputs()
    _, state = op(q, k, v, is_causal=True, return_state=True)
    one = [x[:1] for x in (q, k, v)]
    with pytest.raises(
        ValueError,
        match=r"state: expected numerator \[B, G, F, V\] = \[1, 2, \d+, 3\], got \[2, 2, \d+, 3\]",
    ):
        op(*one, is_causal=True, state=state)
    single = [x.float() for x in (q, k, v)]
    with pytest.raises(
        TypeError, match=r"state: expected torch.float32 on cpu, got torch.float64 on cpu"
    ):
        op(*single, is_causal=True, state=state)


def test_states_of_another_variant():
    q, k, v = inputs()
    _, state = cm.taylor_attention(q, k, v, is_causal=True, return_state=True)
    with pytest.raises(
        ValueError,
        match=r"state: expected numerator .* = \[2, 2, 56, 3\], got \[2, 2, 21, 3\]; .* order",
    ):
        cm.taylor_attention(q, k, v, 3, is_causal=True, state=state)
    _, bare = cm.linear_attention(q, k, v, normalize=False, is_causal=True, return_state=True)
    with pytest.raises(
        ValueError,
        match=(
            r"state: expected denominator \[B, G, F\] = \[2, 2, 5\], got None \(normalize=False\)"
        ),
    ):
        cm.linear_attention(q, k, v, is_causal=True, state=bare)


@pytest.mark.parametrize("order", [0, -1, 1.5, "2", True])
def test_order(order):
    with pytest.raises(ValueError, match=r"order: expected an integer of at least 1, got "):
        cm.taylor_attention(*inputs(), order)
    with pytest.raises(ValueError, match=r"order: expected an integer of at least 1, got "):
        cm.feature_count(16, order)


def test_pairs_of_feature_maps():
    q, k, v = inputs()
    with pytest.raises(
        ValueError, match=r"got 'hedgehog'; learned maps by name are cumulant.nn.LinearAttention's"
    ):
        cm.linear_attention(q, k, v, "hedgehog")
    with pytest.raises(
        TypeError, match=r"feature_map: expected a pair of callables, for queries and for keys"
    ):
        cm.linear_attention(q, k, v, (torch.exp,))
    with pytest.raises(
        TypeError, match=r"feature_map: expected a pair of callables, for queries and for keys"
    ):
        cm.linear_attention(q, k, v, ("elu", "elu"))
    wide = lambda x: torch.cat((x, x), -1)  # noqa: E731
    with pytest.raises(
        ValueError,
        match=r"feature_map: expected as many features for queries as for keys, got 10 and 5",
    ):
        cm.linear_attention(q, k, v, (wide, torch.exp))


def test_feature_map():
    q, k, v = inputs()
    with pytest.raises(
        ValueError,
        match=(
            r"feature_map: expected one of 'elu', 'relu', 'identity', 'softmax' or a callable, got"
            r" 'gelu'"
        ),
    ):
        cm.linear_attention(q, k, v, "gelu")
    with pytest.raises(TypeError, match=r"feature_map: expected a name or a callable, got int"):
        cm.linear_attention(q, k, v, 3)
    with pytest.raises(
        ValueError,
        match=r"feature_map: expected \[\.\.\., F\] for query \[2, 4, 37, 5\], got \[2, 4, 37\]",
    ):
        cm.linear_attention(q, k, v, lambda x: x.sum(-1))


def test_feature_count():
    assert [cm.feature_count(16, p) for p in (1, 2, 3)] == [17, 153, 969]
    assert cm.feature_count(16, 2, constant_term=False) == 152
    with pytest.raises(ValueError, match="order: expected an integer of at least 1, got 0"):
        cm.feature_count(16, 0)
    with pytest.raises(ValueError, match="dim: expected at least 1, got -3"):
        cm.feature_count(-3, 2)
