"""ELiTA's TensorFlow layers, against a transcription of the published equations in NumPy."""

import importlib.util
import zipfile

import numpy as np
import pytest
import torch

from cumulant import nn
from cumulant.interop import from_elita

H, D, V, M, A, F = 3, 12, 5, 4, 7, 8


def attention_weights(k3=True, size=1.0, seed=0):
    draw = np.random.default_rng(seed)
    shapes = dict.fromkeys(("k1", "k2", "k3"), (H, D)) | dict.fromkeys(
        ("a1", "a2", "b1", "b2", "c"), (H, M, 1)
    )
    shapes |= {"value_weight": (H, D, V), "output_weight": (H, D, V)}
    if not k3:
        del shapes["k3"]
    return {name: size * draw.standard_normal(shape) for name, shape in shapes.items()}


def feed_forward_weights(seed=0):
    draw = np.random.default_rng(seed)
    shapes = {"w1": (D, A), "w2": (D, F), "w3": (A, F, D), "b1": (A,), "b2": (F,), "b3": (D,)}
    return {name: draw.standard_normal(shape) for name, shape in shapes.items()}


def attention(w, x, clip=20.0):
    """Attention2: row i averages the first i values, weighted by the equations' exponentials."""
    B, T, _ = x.shape
    y = np.zeros_like(x)
    for b in range(B):
        for h in range(H):
            values = x[b] @ w["value_weight"][h]
            logits = []
            for n in ("1", "2"):
                angle = (
                    np.outer(np.linspace(0.0, 1.0, T), w[f"a{n}"][h, :, 0]) + w[f"b{n}"][h, :, 0]
                )
                logits.append(np.sin(angle) @ w["c"][h, :, 0])
            shared, own = x[b] @ w["k1"][h] + logits[0], x[b] @ w["k2"][h]
            row = logits[1] + (x[b] @ w["k3"][h] if "k3" in w else 0)
            X, diagonal, R = (np.exp(np.clip(z, -clip, clip)) for z in (shared, own, row))
            for i in range(T):
                top = diagonal[i] * values[i] + R[i] * (X[: i + 1] @ values[: i + 1])
                y[b, i] += w["output_weight"][h] @ (top / (diagonal[i] + R[i] * X[: i + 1].sum()))
    return y


def swish(x):
    return x / (1 + np.exp(-x))


def feed_forward(w, x):
    a, b = swish(x @ w["w1"] + w["b1"]), swish(x @ w["w2"] + w["b2"])
    return np.einsum("bti,btj,ijk->btk", a, b, w["w3"]) + w["b3"]


def normed(x):
    """Keras' LayerNormalization without scale and center."""
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-3)


def tokens(T=23, seed=1):
    return np.random.default_rng(seed).standard_normal((2, T, D))


def close(y, expected, bound=1e-12):
    assert np.abs(y.detach().numpy() - expected).max() <= bound * np.abs(expected).max()


@pytest.mark.parametrize("k3", [True, False], ids=["k3", "as published"])
@pytest.mark.parametrize("T", [1, 2, 23])
def test_attention_compatible(k3, T):
    w, x = attention_weights(k3), tokens(T)
    module = from_elita(w, compatible=True)
    close(module(torch.from_numpy(x)), attention(w, x))
    single = from_elita(
        {name: value.astype(np.float32) for name, value in w.items()}, compatible=True
    )
    assert single.v_proj.weight.dtype == torch.float32
    close(single(torch.from_numpy(x).float()), attention(w, x), 1e-5)


def test_attention_with_a_horizon():
    """The training length less one gives the published positions, and other lengths keep them."""
    w, x = attention_weights(), tokens(23)
    module = from_elita(w, horizon=22)
    close(module(torch.from_numpy(x)), attention(w, x))
    first, state = module(torch.from_numpy(x[:, :9]), return_state=True)
    second = module(torch.from_numpy(x[:, 9:]), state=state)
    close(torch.cat((first, second), 1), attention(w, x))
    other = from_elita(w, horizon=40)
    assert np.abs(other(torch.from_numpy(x)).detach().numpy() - attention(w, x)).max() > 1e-3


def test_clipping_is_the_originals():
    """At large logits the clipped layer equals the original's, and the exact one does not."""
    w, x = attention_weights(size=4.0), tokens(9)
    clipped, exact = from_elita(w, compatible=True), from_elita(w, horizon=8)
    close(clipped(torch.from_numpy(x)), attention(w, x))
    assert np.abs(attention(w, x) - attention(w, x, clip=600)).max() > 1e-2  # the clip is reached
    close(exact(torch.from_numpy(x)), attention(w, x, clip=600))


def test_positions_of_masked_and_packed_sequences_are_their_own():
    w = attention_weights()
    module = from_elita(w, compatible=True)
    x = torch.from_numpy(tokens(14))
    mask = torch.ones(2, 14, dtype=torch.bool)
    mask[0, :5], mask[1, 8:] = False, False
    y = module(x, key_mask=mask)
    for b in range(2):
        alone = module(x[b : b + 1, mask[b]])
        assert torch.allclose(y[b, mask[b]], alone[0], atol=1e-12)
    row = x[:1]
    packed = module(row, cu_seqlens=torch.tensor([0, 4, 4, 13]))
    for a, b in ((0, 4), (4, 13)):
        assert torch.allclose(packed[:, a:b], module(row[:, a:b]), atol=1e-12)
    assert not packed[:, 13:].any()


def test_no_state_without_a_horizon():
    module = from_elita(attention_weights(), compatible=True)
    x = torch.from_numpy(tokens())
    with pytest.raises(
        ValueError,
        match=r"state: with horizon=None positions depend on the length .* give a horizon",
    ):
        module(x, return_state=True)


def test_feed_forward():
    w, x = feed_forward_weights(), tokens()
    close(from_elita(w)(torch.from_numpy(x)), feed_forward(w, x))


def test_a_stack_of_layers(tmp_path):
    """The whole published trunk is read from an archive with TensorFlow's names and prefixes."""
    parts = {}
    for i in range(2):
        suffix = f"_{i}" if i else ""
        parts |= {
            f"model2/attention2{suffix}/{n}:0": x
            for n, x in attention_weights(False, seed=i).items()
        }
        parts |= {
            f"model2/feed_forward2{suffix}/{n}:0": x
            for n, x in feed_forward_weights(seed=i).items()
        }
    np.savez(tmp_path / "model.npz", **parts)
    x = tokens()
    expected, y = x, torch.from_numpy(x)
    norm = torch.nn.LayerNorm(D, eps=1e-3, elementwise_affine=False)
    for i in range(2):
        suffix = f"_{i}" if i else ""
        expected = expected + attention(attention_weights(False, seed=i), normed(expected))
        expected = expected + feed_forward(feed_forward_weights(seed=i), normed(expected))
        y = y + from_elita(
            tmp_path / "model.npz", prefix=f"model2/attention2{suffix}/", compatible=True
        )(norm(y))
        y = y + from_elita(str(tmp_path / "model.npz"), prefix=f"model2/feed_forward2{suffix}/")(
            norm(y)
        )
    close(y, expected)
    with pytest.raises(
        ValueError,
        match=r"weights: more than one 'b1', in 'model2/feed_forward2/b1:0' the second; .* prefix=",
    ):
        from_elita(tmp_path / "model.npz", compatible=True)
    with pytest.raises(ValueError, match=r"weights: no arrays whose names begin with 'other/'"):
        from_elita(tmp_path / "model.npz", prefix="other/")


@pytest.mark.parametrize("name", ["k1", "k2", "a1", "b2", "c", "value_weight", "output_weight"])
def test_a_missing_array_is_named(name):
    w = attention_weights()
    del w[name]
    with pytest.raises(
        ValueError, match=rf"weights: '{name}' of ELiTA's Attention2 is missing; found "
    ):
        from_elita(w, compatible=True)


@pytest.mark.parametrize("name", ["w1", "w2", "w3", "b1", "b3"])
def test_a_missing_array_of_the_feed_forward_is_named(name):
    w = feed_forward_weights()
    del w[name]
    with pytest.raises(
        ValueError, match=rf"weights: '{name}' of ELiTA's FeedForward2 is missing; found "
    ):
        from_elita(w)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k2": np.zeros((H, D + 1))},
         r"weights: k2: expected floats \[H, D\] = \[3, 12\], got torch.float64 \[3, 13\]"),
        ({"k3": np.zeros((H + 1, D))},
         r"weights: k3: expected floats \[H, D\] = \[3, 12\], got .* \[4, 12\]"),
        ({"a1": np.zeros((H, M))},
         r"weights: a1: expected floats \[H, M, 1\] = \[3, M, 1\], got .* \[3, 4\]"),
        ({"c": np.zeros((H, M + 1, 1))},
         r"weights: c: expected floats \[H, M, 1\] = \[3, 4, 1\], got .* \[3, 5, 1\]"),
        ({"output_weight": np.zeros((H, V, D))},
         r"weights: output_weight: expected floats \[H, D, V\] = \[3, 12, 5\], got .* \[3, 5, "
         r"12\]"),
        (dict.fromkeys(("k1",), np.zeros((H, D), dtype=np.int64)),
         r"weights: k1: expected floats .* got torch.int64"),
        ({"c": np.zeros((H, M, 1), dtype=np.float32)},
         r"weights: c: expected torch.float64 as the others, got torch.float32"),
        ({"c": np.array("text")}, r"weights: c: not an array of numbers: "),
        ({"w9": np.zeros(3)}, r"weights: 'w9' has no place in ELiTA's Attention2"),
    ],
)  # fmt: skip
def test_a_misshapen_array_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        from_elita(attention_weights() | change, compatible=True)


def test_other_mistakes(tmp_path):
    with pytest.raises(
        ValueError,
        match=r"horizon: the weights do not tell it; give horizon=\(training length - 1\)",
    ):
        from_elita(attention_weights())
    with pytest.raises(
        ValueError,
        match=r"horizon: with compatible=True positions follow each sequence's own length",
    ):
        from_elita(attention_weights(), horizon=9, compatible=True)
    with pytest.raises(
        ValueError, match=r"horizon: expected a number of positions above 0, got -3"
    ):
        from_elita(attention_weights(), horizon=-3)
    with pytest.raises(ValueError, match=r"horizon: a feed-forward has no positions"):
        from_elita(feed_forward_weights(), horizon=9)
    with pytest.raises(
        TypeError, match=r"weights: expected arrays by name or an .npz file, got int"
    ):
        from_elita(3)
    with pytest.raises(FileNotFoundError):
        from_elita(tmp_path / "missing.npz")
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(ValueError, match=r"weights: .*text.npz is not an .npz archive of arrays"):
        from_elita(tmp_path / "text.npz")
    np.savez(tmp_path / "objects.npz", k1=np.array([{}], dtype=object))
    assert zipfile.is_zipfile(tmp_path / "objects.npz")
    with pytest.raises(
        ValueError, match=r"weights: .*objects.npz is not an .npz archive of arrays"
    ):
        from_elita(tmp_path / "objects.npz")
    (tmp_path / "empty.npz").touch()
    with pytest.raises(ValueError, match=r"weights: .*empty.npz is not an .npz archive of arrays"):
        from_elita(tmp_path / "empty.npz")
    with pytest.raises(
        ValueError, match=r"weights: 'k1' of ELiTA's Attention2 is missing; found k2"
    ):
        from_elita({"k2": np.zeros((H, D))}, compatible=True)
    np.save(tmp_path / "one.npy", np.zeros(3))
    with pytest.raises(ValueError, match=r"weights: .*one.npy is not an .npz archive of arrays"):
        from_elita(tmp_path / "one.npy")


@pytest.mark.skipif(
    importlib.util.find_spec("tensorflow") is None, reason="TensorFlow is not installed"
)
@pytest.mark.parametrize("T", [1, 23])
def test_against_tensorflow(T):
    """TensorFlow's own linspace, sine, clip and cumsum give the same in single precision."""
    import tensorflow as tf

    w, x = attention_weights(False), tokens(T)
    single = {name: tf.constant(value.astype(np.float32)) for name, value in w.items()}
    z = tf.constant(x.astype(np.float32))
    place = tf.linspace(0.0, 1.0, T)
    p1, p2 = (
        tf.reduce_sum(tf.sin(single[f"a{n}"] * place + single[f"b{n}"]) * single["c"], 1)
        for n in "12"
    )
    limited = lambda logit: tf.exp(tf.clip_by_value(logit, -20.0, 20.0))[..., None]  # noqa: E731
    weight = limited(tf.einsum("btd,hd->bht", z, single["k1"]) + p1)
    own = limited(tf.einsum("btd,hd->bht", z, single["k2"]))
    values = tf.einsum("btd,hdv->bhtv", z, single["value_weight"])
    top = tf.cumsum(weight * values, axis=2) * limited(p2) + own * values
    expected = tf.einsum(
        "bhtv,hdv->btd",
        top / (tf.cumsum(weight, axis=2) * limited(p2) + own),
        single["output_weight"],
    ).numpy()
    module = from_elita(
        {name: value.astype(np.float32) for name, value in w.items()}, compatible=True
    )
    close(module(torch.from_numpy(x).float()), expected, 1e-4)
    assert isinstance(module, nn.ElitaAttention)
