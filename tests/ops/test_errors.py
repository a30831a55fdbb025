"""Bad input: every message names the argument, what was expected and what came."""

import pytest
import torch

import cumulant as cm

from .cases import inputs, linear_part

OPS = [cm.taylor_attention, cm.linear_attention]
by_op = pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)


def long(*shape):
    return torch.zeros(shape, dtype=torch.int64)


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
        ({"impl": "triton"}, ValueError,
         r"impl: 'triton' is not part of this version of cumulant; these work: 'native', 'torch', "
         r"'reference'"),
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


@pytest.mark.parametrize("is_causal", [True, False])
def test_many_features_and_few_tokens(is_causal):
    """`auto` forms no features where all weights cost less, and only there; see the log for the
    threshold.
    """

    def chosen(T, K, order, **options):
        sizes = {"impl": "auto", "is_causal": is_causal} | options
        return cm.explain(
            cm.taylor_attention, *inputs(1, 1, T, K, 8, G=1, dtype=torch.float32), order, **sizes
        )

    many = chosen(100, 16, 4)
    assert (
        str(many)
        == "torch: the fastest available here: one block of 100 tokens, the quadratic form; "
        "query read as B = 1 rows, H = 1 heads, T = 100 tokens"
    )
    assert chosen(100, 16, 2).impl == "native"  # 153 features
    assert chosen(129, 16, 4).impl == "native"
    assert chosen(50, 16, 4).impl == (
        "native" if is_causal else "torch"
    )  # causal, one native block needs none either
    assert chosen(100, 16, 4, impl="native").impl == "native"
    assert chosen(100, 16, 4, return_state=True).impl == "native"
    assert chosen(100, 16, 4, cu_seqlens=torch.tensor([0, 50, 100])).impl == "native"


def test_explain():
    q, k, v = inputs()
    assert (
        str(cm.explain(cm.taylor_attention, q, k, v, is_causal=True))
        == "native: the fastest available here: one block of 37 tokens, the quadratic form; "
        "query read as B = 2 rows, H = 4 heads, T = 37 tokens"
    )
    choice = cm.explain(cm.taylor_attention, q, k, v, 9, is_causal=True)
    assert (choice.impl, choice.reason[:26]) == ("torch", "the fastest available here")
    with pytest.raises(
        ValueError,
        match="impl: 'native' cannot run this call: its kernels go up to order 8, and this is",
    ):
        cm.explain(cm.taylor_attention, q, k, v, 9, impl="native")
    elsewhere = (x.to("meta") for x in (q, k, v))
    with pytest.raises(
        ValueError,
        match="its kernels are for the CPU, and the inputs are on meta; these work: 'torch'",
    ):
        cm.taylor_attention(*elsewhere, impl="native")
    long = inputs(1, 1, 4096, 16, 8, G=1, dtype=torch.float32)
    choice = cm.explain(cm.taylor_attention, *long, is_causal=True, impl="torch")
    assert (
        str(choice)
        == "torch: asked for: chunks of 128 tokens, 153 features; query read as B = 1 rows, H = 1"
        " heads, T = 4096 tokens"
    )
    assert cm.explain(cm.linear_attention, q, k, v, impl="reference").impl == "reference"
    context = (*inputs(T=5)[:1], *inputs(T=7)[1:])
    assert "chunks of 128 tokens" in cm.explain(cm.taylor_attention, *context, impl="torch").reason
    assert "chunks of 64 tokens" in cm.explain(cm.taylor_attention, *context, impl="native").reason
    with pytest.raises(
        TypeError, match="op: expected an operation such as cumulant.taylor_attention, got"
    ):
        cm.explain(torch.softmax, q)
    with pytest.raises(TypeError, match="unexpected keyword|got an unexpected"):
        cm.explain(cm.linear_attention, q, k, v, casual=True)


def five(T=37):
    q, k, v = inputs(T=T)
    return dict(
        zip(
            ("quad_query", "quad_key", "lin_query", "lin_key", "value"),
            (q, k, *linear_part(q, k), v),
        )
    )


def wide(*shape, dtype=torch.float64):
    return torch.zeros(shape, dtype=dtype)


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
        ({"impl": "triton"}, ValueError, r"impl: 'triton' is not part of this version"),
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
    arguments = five() | {"is_causal": True, "group_size": 8} | change
    with pytest.raises(kind, match=message):
        cm.mixed_chunk_attention(**arguments)
    with pytest.raises(kind, match=message):
        cm.explain(cm.mixed_chunk_attention, **arguments)


def test_mixed_chunks_attend_to_themselves():
    arguments = five() | {
        name: x for name, x in five(30).items() if "key" in name or name == "value"
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
    _, state = cm.mixed_chunk_attention(**five(), group_size=8, is_causal=True, return_state=True)
    with pytest.raises(
        ValueError,
        match=r"state: expected quad_key \[2, 2, 16, 5\], got \[2, 2, 8, 5\]; .* group size",
    ):
        cm.mixed_chunk_attention(**five(), group_size=16, is_causal=True, state=state)
    with pytest.raises(
        TypeError, match=r"state: expected torch.float32 on cpu, got torch.float64 on cpu"
    ):
        cm.mixed_chunk_attention(
            **{name: x.float() for name, x in five().items()},
            group_size=8,
            is_causal=True,
            state=state,
        )


def test_explain_gated_operations():
    assert (
        "128 queries at a time on all their keys"
        in cm.explain(cm.gated_attention, *inputs()).reason
    )
    assert (
        "groups of 256 tokens, one after another"
        in cm.explain(cm.mixed_chunk_attention, **five()).reason
    )
    one = five(1) | {"group_size": 8, "is_causal": True, "return_state": True}
    _, state = cm.mixed_chunk_attention(**one)
    assert (
        "one token onto a state" in cm.explain(cm.mixed_chunk_attention, **one, state=state).reason
    )


@pytest.mark.filterwarnings("ignore")
def test_a_group_bias_is_checked_in_compiled_graphs_too():
    run = torch.compile(
        lambda bias: cm.mixed_chunk_attention(**five(), group_size=8, bias=bias), backend="eager"
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


def elita(T=37):
    q, k, v = inputs(T=T)
    return {"key_logit": k[..., 0], "query_logit": q[..., 0], "self_logit": q[..., 1], "value": v}


def with_one(value, at=(1, 0, 3)):
    x = elita()["key_logit"].clone()
    x[at] = value
    return x


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"key_logit": 3}, TypeError, r"key_logit: expected a tensor \[B, H, T\], got int"),
        ({"key_logit": wide(2, 2, 37, 1)}, ValueError,
         r"key_logit: expected \[B, H, T\], got \[2, 2, 37, 1\]"),
        ({"value": wide(2, 2, 37)}, ValueError,
         r"value: expected \[B, G, T, V\], got \[2, 2, 37\]"),
        ({"value": long(2, 2, 37, 3)}, TypeError,
         r"value: expected fp16, bf16, fp32 or fp64, got torch.int64"),
        ({"key_logit": wide(2, 2, 36)}, ValueError,
         r"key_logit: expected \[B, G, T\] = \[2, 2, 37\] as in value, got \[2, 2, 36\]"),
        ({"value": wide(2, 2, 30, 3)}, ValueError,
         r"key_logit: expected \[B, G, T\] = \[2, 2, 30\] as in value, got \[2, 2, 37\]"),
        ({"query_logit": wide(2, 4, 36)}, ValueError,
         r"query_logit: expected \[B, H, T\] = \[2, 4, 37\], T as in value, got \[2, 4, 36\]"),
        ({"self_logit": wide(2, 2, 37)}, ValueError,
         r"self_logit: expected \[B, H, T\] = \[2, 4, 37\], T as in value, got \[2, 2, 37\]"),
        ({"self_logit": wide(2, 4, 37, dtype=torch.float32)}, TypeError,
         r"self_logit: expected key_logit's dtype, torch.float64, got torch.float32"),
        ({"value": wide(2, 3, 37, 3), "key_logit": wide(2, 3, 37)}, ValueError,
         r"key_logit: the 3 key/value heads \(G\) must divide the 4 query heads"),
        ({"key_logit": with_one(float("nan"))}, ValueError,
         r"key_logit: expected logits below \+inf, -inf for no weight, got nan; an earlier layer"),
        ({"key_logit": with_one(float("inf"))}, ValueError,
         r"key_logit: expected logits below \+inf, .* got inf"),
        ({"query_logit": wide(2, 4, 37) - float("inf")}, ValueError,
         r"query_logit: expected logits finite, got -inf"),
        ({"self_logit": wide(2, 4, 37) * float("nan")}, ValueError,
         r"self_logit: expected logits below \+inf, .* got nan"),
        ({"key_mask": torch.ones(2, 36).bool()}, ValueError,
         r"key_mask: expected \[B, S\] = \[2, 37\], got \[2, 36\]"),
        ({"cu_seqlens": torch.tensor([0, 37])}, ValueError,
         r"cu_seqlens: packed sequences need B = 1"),
        ({"state": (1, 2)}, TypeError,
         r"state: expected a ElitaState from return_state=True, got tuple"),
        ({"impl": "triton"}, ValueError, r"impl: 'triton' is not part of this version"),
    ],
)  # fmt: skip
def test_elita_attention(change, kind, message):
    arguments = elita() | change
    with pytest.raises(kind, match=message):
        cm.elita_attention(**arguments)
    with pytest.raises(kind, match=message):
        cm.explain(cm.elita_attention, **arguments)


def test_elita_states_of_another_call():
    _, state = cm.elita_attention(**elita(), return_state=True)
    with pytest.raises(
        ValueError, match=r"state: expected log_weight \[1, 2\], got \[2, 2\]; the state comes from"
    ):
        cm.elita_attention(**{name: x[:1] for name, x in elita().items()}, state=state)
    with pytest.raises(ValueError, match=r"state: expected mean \[2, 2, 1\], got \[2, 2, 3\]"):
        cm.elita_attention(**elita() | {"value": elita()["value"][..., :1]}, state=state)
    low = cm.ElitaState(state.log_weight, state.mean.float(), state.position)
    with pytest.raises(
        TypeError, match=r"state: expected torch.float64 on cpu, got torch.float32 on cpu"
    ):
        cm.elita_attention(**elita(), state=low)


def test_what_is_masked_may_be_nan():
    """In logits, too: only those of tokens that count are looked at."""
    arguments = elita()
    mask = torch.rand(2, 37) > 0.5
    plain = cm.elita_attention(**arguments, key_mask=mask)
    hidden = {
        name: x.masked_fill(~mask.view(2, 1, 37, *[1] * (x.dim() - 3)), float("nan"))
        for name, x in arguments.items()
    }
    assert torch.equal(cm.elita_attention(**hidden, key_mask=mask), plain)


def test_explain_elita():
    assert (
        "chunks of 8 tokens, side by side"
        in cm.explain(cm.elita_attention, **elita(), impl="torch").reason
    )
    assert "a recurrence, two gates a token" in cm.explain(cm.elita_attention, **elita()).reason
    _, state = cm.elita_attention(**elita(), return_state=True)
    assert (
        "one token onto a state" in cm.explain(cm.elita_attention, **elita(1), state=state).reason
    )
