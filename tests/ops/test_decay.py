"""Log decays of linear and Taylor attention: limits, precision, and what is refused.

The matrix has the formula, every split, masks, packing, states, gradients and dtypes.
"""

from __future__ import annotations

import math

import pytest
import torch

import cumulant as cm

from .cases import IMPLEMENTATIONS, assert_close, error, gradients, inputs
from .walking import walk

OPERATIONS = {
    "taylor": cm.taylor_attention,
    "elu": cm.linear_attention,
    "sums": lambda *args, **kwargs: cm.linear_attention(
        *args, feature_map="relu", normalize=False, **kwargs
    ),
}
by_operation = pytest.mark.parametrize("name", OPERATIONS)
by_implementation = pytest.mark.parametrize("impl", IMPLEMENTATIONS)


def attend(name, q, k, v, log_decay, **kwargs):
    return OPERATIONS[name](q, k, v, is_causal=True, log_decay=log_decay, **kwargs)


def random_decays(shape, least=-20.0, seed=0, dtype=torch.float32):
    """Log decays between `least` and 0, most of them near 0."""
    generator = torch.Generator().manual_seed(seed)
    return least * torch.rand(shape, generator=generator, dtype=dtype) ** 8


@by_operation
@by_implementation
def test_a_log_decay_of_zero_changes_nothing(name, impl):
    q, k, v = inputs(T=300, dtype=torch.float32)
    zero = torch.zeros(2, 2, 300)
    actual, state = attend(name, q, k, v, zero, impl=impl, return_state=True)
    exact, other = attend(name, q, k, v, None, impl=impl, return_state=True)
    assert_close(actual, exact)
    assert_close(state.numerator, other.numerator)
    if impl == "native":
        assert torch.equal(actual, exact)
        assert torch.equal(state.numerator, other.numerator)


@by_operation
@by_implementation
@pytest.mark.parametrize("border", [-math.inf, -1e30, -1e4])
def test_minus_infinity_begins_a_document(name, impl, border, monkeypatch):
    """Tokens before the border are forgotten; decays after it keep all their digits."""
    walk(monkeypatch, chunk=16)
    q, k, v = inputs(B=1, T=60)
    decays = -torch.rand(1, 2, 60, dtype=torch.float64) * 1e-3
    whole = decays.clone()
    whole[:, :, (17, 40)] = border
    bounds = torch.tensor([0, 17, 40, 60])
    leaves = [x.clone().requires_grad_() for x in (q, k, v, whole)]
    joined = attend(name, *leaves, impl=impl)
    others = [x.clone().requires_grad_() for x in (q, k, v, decays)]
    separate = attend(name, *others, impl=impl, cu_seqlens=bounds)
    assert_close(joined, separate, 100)
    for actual, exact in zip(gradients(joined, leaves), gradients(separate, others)):
        assert_close(actual, exact, 1000)


@by_operation
def test_gradients_are_finite_beside_infinite_decays(name):
    leaves = [x.requires_grad_() for x in inputs(T=300)]
    decays = torch.zeros(2, 2, 300, dtype=torch.float64)
    decays[:, :, ::7] = -math.inf
    decays.requires_grad_()
    for found in gradients(attend(name, *leaves, decays), [*leaves, decays]):
        assert found.isfinite().all()


@by_implementation
def test_strong_decays_leave_the_newest_value(impl):
    """Thousands of decays to nearly nothing underflow into no NaN."""
    q, k, v = inputs(B=1, H=2, T=3000, G=2, dtype=torch.float32)
    out, state = cm.taylor_attention(
        q, k, v, is_causal=True, log_decay=torch.full((1, 2, 3000), -200.0), impl=impl,
        return_state=True,
    )  # fmt: skip
    assert_close(out, v)
    assert state.numerator.isfinite().all()


def compare_with_float64(log_decay, name, length, steps=0):
    """Relative errors of outputs and of the state in fp32."""
    shape = (1, 1, length)
    q, k, v = inputs(B=1, H=1, T=length, K=4, V=2, G=1, dtype=torch.float32)
    logs = log_decay.expand(shape)
    with torch.no_grad():
        out, state = attend(name, q, k, v, logs, return_state=True)
        wide = [x.double() for x in (q, k, v, logs)]
        exact, end = attend(name, *wide, return_state=True)
    return error(out, exact), error(state.numerator, end.numerator)


LENGTHS = [20_000, pytest.param(1_000_000, marks=pytest.mark.slow)]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", ["taylor", "elu"])
@pytest.mark.parametrize("decay", ["constant", "random", "none"])
def test_precision_over_many_tokens(decay, name, length):
    """fp32 within 1e-6 of float64: a factor near 1 must not be rounded once a chunk."""
    logs = {
        "constant": torch.tensor(-1e-6),
        "random": random_decays((1, 1, length)),
        "none": torch.zeros(()),
    }[decay]
    out, state = compare_with_float64(logs, name, length)
    assert out < 1e-6
    if decay != "none":
        assert state < 1e-6
        return
    # sums that never decay are those without decays, bit by bit
    x = inputs(B=1, H=1, T=length, K=4, V=2, G=1, dtype=torch.float32)
    sums, plain = (
        attend(name, *x, given, impl="native", return_state=True)[1]
        for given in (logs.expand(1, 1, length), None)
    )
    assert torch.equal(sums.numerator, plain.numerator)
    assert torch.equal(sums.denominator, plain.denominator)


@pytest.mark.parametrize("decay", [-1e-3, -1e-4])
def test_precision_over_many_chunks(decay, monkeypatch):
    """5,000 chunks: sums rounded to fp32 in each would be off by 2e-6 to 1e-5."""
    walk(monkeypatch, chunk=4)
    assert max(compare_with_float64(torch.tensor(decay), "taylor", 20_000)) < 3e-7


@by_implementation
def test_precision_of_weak_decays_beside_strong_ones(impl):
    """Sums of log decays in fp32 would lose the small ones; under torch.func as well."""
    q, k, v = inputs(B=1, H=2, T=300, K=4, V=3, G=1, dtype=torch.float32)
    logs = random_decays((1, 1, 300)).float()
    wide = [x.double() for x in (q, k, v, logs)]
    exact = attend("taylor", *wide, impl="reference")
    assert_close(attend("taylor", q, k, v, logs, impl=impl), exact)
    transformed, _ = torch.func.jvp(
        lambda v: attend("taylor", q, k, v, logs, impl=impl), (v,), (v,)
    )
    assert_close(transformed, exact)


@pytest.mark.parametrize("logs", [-1e-6, -1e-3, -0.3])
def test_precision_token_by_token(logs):
    """3,000 steps are as exact as the whole."""
    q, k, v = inputs(B=1, H=1, T=3000, K=3, V=2, G=1, dtype=torch.float32)
    exact = cm.taylor_attention(
        *(x.double() for x in (q, k, v)), is_causal=True,
        log_decay=torch.full((1, 1, 3000), logs, dtype=torch.float64),
    )  # fmt: skip
    state, outs = None, []
    for t in range(3000):
        token = (x[:, :, t : t + 1] for x in (q, k, v))
        out, state = cm.taylor_attention(
            *token, is_causal=True, log_decay=torch.full((1, 1, 1), logs), state=state,
            return_state=True,
        )  # fmt: skip
        outs.append(out)
    assert_close(torch.cat(outs, 2), exact)


@pytest.mark.parametrize("least", [-1e-4, -1.0, -20.0])
def test_gradients_of_decays_are_exact_in_fp32(least):
    """Weak decays reach over many chunks; differences of long sums would lose strong ones."""
    q, k, v = inputs(B=1, H=2, T=2000, K=4, V=3, G=1, dtype=torch.float32)
    logs = random_decays((1, 1, 2000), least)
    leaves = [x.requires_grad_() for x in (q, k, v, logs)]
    wide = [x.detach().double().requires_grad_() for x in leaves]
    found = gradients(attend("taylor", *leaves), leaves)
    exact = gradients(attend("taylor", *wide), wide)
    for actual, other in zip(found, exact):
        assert error(actual, other) < 2e-6


@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
def test_gradients_with_few_sums_kept(packed, monkeypatch):
    """Where sums take more memory than the inputs, the backward pass keeps only some of them."""
    walk(monkeypatch, chunk=2)
    masks = {"cu_seqlens": torch.tensor([0, 9, 9, 12, 31])} if packed else {}
    results = []
    for impl in ("torch", "reference"):
        q, k, v = (x.requires_grad_() for x in inputs(B=1, T=37, K=5, V=4))
        logs = random_decays((1, 2, 37), -3.0, dtype=torch.float64).requires_grad_()
        out = attend("taylor", q, k, v, logs, impl=impl, return_state=True, **masks)
        results.append(gradients(out, (q, k, v, logs)))
    for actual, exact in zip(*results):
        assert_close(actual, exact, 1000)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"log_decay": [0.0]}, TypeError, r"log_decay: expected a tensor \[B, G, S\] = \[2, 2, 37"),
        ({"log_decay": torch.zeros(2, 2, 37).half()}, TypeError, "log_decay: expected fp32 or fp"),
        ({"log_decay": torch.zeros(2, 4, 37)}, ValueError, "one for each key/value head and token"),
        ({"log_decay": torch.zeros(2, 2, 37, 1)}, ValueError, r"got \[2, 2, 37, 1\]"),
        ({"log_decay": torch.full((2, 2, 37), 0.5)}, ValueError, "at most 0, got 0.5; use logsigm"),
        ({"log_decay": torch.full((2, 2, 37), math.nan)}, ValueError, "at most 0, got NaN"),
        ({"log_decay": torch.zeros(2, 2, 37, device="meta")}, TypeError, "on cpu like query, got"),
        ({"log_decay": torch.zeros(2, 37, 2)}, ValueError, r"got \[2, 37, 2\]; use log_decay.mT"),
        ({"log_decay": torch.zeros(2, 2, 37).to_sparse()}, TypeError, "dense tensor, .*to_dense"),
        ({"is_causal": False}, ValueError, "log_decay: decays follow time, so they need is_causal"),
        ({"feature_map": "softmax"}, ValueError, "log_decay: feature_map 'softmax' divides by su"),
    ],
)  # fmt: skip
def test_refused(change, kind, message):
    q, k, v = inputs(dtype=torch.float32)
    given = {"is_causal": True, "log_decay": torch.zeros(2, 2, 37), **change}
    with pytest.raises(kind, match=message):
        cm.linear_attention(q, k, v, **given)


@by_implementation
def test_positive_decays_count_as_zero_where_they_cannot_be_checked(impl):
    """In graphs; eager calls refuse them."""
    q, k, v = inputs(dtype=torch.float32)
    logs = torch.randn(2, 2, 37)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(logs):
        return attend("taylor", q, k, v, logs, impl=impl)

    if impl != "reference":
        assert_close(compiled(logs), attend("taylor", q, k, v, logs.clamp(max=0), impl=impl))


def test_masked_tokens_and_slack_may_hold_anything():
    q, k, v = inputs(dtype=torch.float32)
    logs, mask = -torch.rand(2, 2, 37), torch.rand(2, 37) > 0.3
    dirty = logs.masked_fill(~mask[:, None], math.nan)
    clean = attend("elu", q, k, v, logs, key_mask=mask)
    assert torch.equal(attend("elu", q, k, v, dirty, key_mask=mask), clean)
