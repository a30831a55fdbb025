"""`explain` tells which implementation runs a call, and why."""

import pytest
import torch

import cumulant as cm

from .arguments import elita_arguments, mixed_arguments
from .cases import inputs


@pytest.mark.parametrize("is_causal", [True, False])
def test_many_features_and_few_tokens(is_causal):
    """`auto` forms no features where all weights cost less; the log has the threshold."""

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


def test_explain_gated_operations():
    assert (
        "128 queries at a time on all their keys"
        in cm.explain(cm.gated_attention, *inputs()).reason
    )
    assert (
        "groups of 256 tokens, one after another"
        in cm.explain(cm.mixed_chunk_attention, **mixed_arguments()).reason
    )
    one = mixed_arguments(1) | {"group_size": 8, "is_causal": True, "return_state": True}
    _, state = cm.mixed_chunk_attention(**one)
    assert (
        "one token onto a state" in cm.explain(cm.mixed_chunk_attention, **one, state=state).reason
    )


def test_explain_elita():
    assert (
        "chunks of 8 tokens, side by side"
        in cm.explain(cm.elita_attention, **elita_arguments(), impl="torch").reason
    )
    assert (
        "a recurrence, two gates a token"
        in cm.explain(cm.elita_attention, **elita_arguments()).reason
    )
    _, state = cm.elita_attention(**elita_arguments(), return_state=True)
    assert (
        "one token onto a state"
        in cm.explain(cm.elita_attention, **elita_arguments(1), state=state).reason
    )
