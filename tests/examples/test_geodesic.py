"""The geodesic experiment: its geometry against closed forms, its model against the law, and that
it trains.
"""

import importlib
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

FOLDER = Path(__file__).parents[2] / "examples" / "geodesic"
sys.path.insert(0, str(FOLDER))
geometry, model, train, cost = (
    importlib.import_module(name) for name in ("geometry", "model", "train", "cost")
)
sys.path.remove(str(FOLDER))

SMALL = {"vocab_size": 11, "dim": 6, "rank": 2, "hidden": 8, "steps": 2}


@pytest.fixture(autouse=True)
def double():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def diagonal(values):
    return torch.diag_embed(torch.stack(values, -1))


def constant_curvature(k, x):
    """The unit sphere in stereographic coordinates (k = 1), the Poincaré ball (k = -1), flat space
    (k = 0).
    """
    factor = 4 / (1 + k * x.square().sum(-1)) ** 2
    return factor[..., None, None] * torch.eye(x.shape[-1])


def embedded_ball(k, x):
    """Where the point lies on the sphere, or on the hyperboloid: the last coordinate is the
    axis.
    """
    square = k * x.square().sum(-1, keepdim=True)
    return torch.cat((2 * x, 1 - square), -1) / (1 + square)


def polar(x):
    """The unit sphere with θ from the pole and φ around it."""
    return diagonal([torch.ones_like(x[..., 0]), torch.sin(x[..., 0]) ** 2])


def embedded_polar(x):
    theta, phi = x.unbind(-1)
    return torch.stack((theta.sin() * phi.cos(), theta.sin() * phi.sin(), theta.cos()), -1)


CHARTS = {
    "sphere": (partial(constant_curvature, 1), partial(embedded_ball, 1), torch.cos, torch.sin, -1),
    "hyperbolic": (
        partial(constant_curvature, -1),
        partial(embedded_ball, -1),
        torch.cosh,
        torch.sinh,
        1,
    ),
    "polar": (polar, embedded_polar, torch.cos, torch.sin, -1),
}
CASES = [
    ("sphere", 1),
    ("sphere", 2),
    ("sphere", 4),
    ("hyperbolic", 2),
    ("hyperbolic", 4),
    ("polar", 2),
]


def learned(dim=5, rank=2, hidden=7):
    """A metric far from the identity, that varies over the distances of the tests."""
    metric = model.LearnedMetric(dim, rank, hidden)
    torch.nn.init.normal_(metric.hidden.weight)
    torch.nn.init.normal_(metric.out.weight)
    return metric


def start(chart, dim):
    """Three points and velocities whose ways lead neither to a pole nor near the edge of the
    ball.
    """
    x = (
        torch.tensor([[1.1, 0.3], [1.7, -2.0], [1.9, 1.0]])
        if chart == "polar"
        else 0.2 * torch.randn(3, dim)
    )
    return x, 0.5 * F.normalize(torch.randn(3, dim), dim=-1)


@pytest.mark.parametrize(("chart", "dim"), CASES)
def test_geodesics_are_great_circles(chart, dim):
    """End point and end velocity, for any time, against p cos ωt + u/ω sin ωt (cosh, sinh on the
    hyperboloid).
    """
    metric, embed, cos, sin, sign = CHARTS[chart]
    x, v = start(chart, dim)
    p, u = torch.func.jvp(embed, (x,), (v,))
    omega = geometry.energy(metric, x, v).sqrt()[:, None]
    for time in (1.0, 0.6):
        x1, v1 = geometry.geodesic(metric, x, v, 60, time)
        p1, u1 = torch.func.jvp(embed, (x1,), (v1,))
        expected = p * cos(omega * time) + u / omega * sin(omega * time)
        assert torch.allclose(p1, expected, rtol=0, atol=1e-8)
        assert torch.allclose(
            u1, sign * p * omega * sin(omega * time) + u * cos(omega * time), rtol=0, atol=1e-8
        )
        assert (p1 - p - time * u).norm(dim=-1).min() > 1e-3  # far from straight


@pytest.mark.parametrize("chart", ["sphere", "polar"])
def test_the_integration_is_of_order_four(chart):
    """Half the step, a sixteenth of the error, in the end point and in the end velocity."""
    metric = CHARTS[chart][0]
    x, v = start(chart, 2)
    true = torch.stack(geometry.geodesic(metric, x, v, 160))
    coarse, fine = (
        (torch.stack(geometry.geodesic(metric, x, v, n)) - true).norm(dim=(1, 2)) for n in (20, 40)
    )
    ratio = coarse / fine
    assert ratio.min() > 14
    assert ratio.max() < 18


def test_the_integration_is_the_classic_method():
    """One step of the textbook's formulas on the pair (x, v), and two."""
    metric = learned()
    x, v = torch.randn(2, 3, 5)

    def slope(x, v):
        return torch.stack((v, geometry.acceleration(metric, x, v)))

    h, pair = 0.35, torch.stack((x, v))
    for steps in (1, 2):
        k1 = slope(*pair)
        k2 = slope(*(pair + h / 2 * k1))
        k3 = slope(*(pair + h / 2 * k2))
        k4 = slope(*(pair + h * k3))
        pair = pair + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        found = torch.stack(geometry.geodesic(metric, x, v, steps, h * steps))
        assert torch.allclose(found, pair, atol=1e-12)


@pytest.mark.parametrize("chart", [*CHARTS, "learned"])
def test_energy_is_conserved_and_time_reverses(chart):
    metric = learned(2) if chart == "learned" else CHARTS[chart][0]
    x, v = start(chart, 2)
    before = geometry.energy(metric, x, v)
    assert torch.allclose(before, torch.einsum("ni,nij,nj->n", v, metric(x), v))
    x1, v1 = geometry.geodesic(metric, x, v, 60)
    assert torch.allclose(geometry.energy(metric, x1, v1), before, rtol=1e-7)
    assert not torch.allclose(
        geometry.energy(metric, x1, v), before, rtol=1e-3
    )  # it would not be without turning
    x2, v2 = geometry.geodesic(metric, x1, -v1, 60)
    assert torch.allclose(x2, x, atol=1e-7)
    assert torch.allclose(v2, -v, atol=1e-7)
    # the same way at half the speed
    assert torch.allclose(geometry.geodesic(metric, x, v / 2, 60, 2.0)[0], x1, atol=1e-12)


def test_christoffel_symbols_of_the_sphere():
    x, _ = start("polar", 2)
    expected = torch.zeros(3, 2, 2, 2)
    expected[:, 0, 1, 1] = -x[:, 0].sin() * x[:, 0].cos()
    expected[:, 1, 0, 1] = expected[:, 1, 1, 0] = x[:, 0].cos() / x[:, 0].sin()
    assert torch.allclose(geometry.christoffel(polar, x), expected, atol=1e-12)
    assert torch.allclose(geometry.christoffel(polar, x[1]), expected[1], atol=1e-12)


@pytest.mark.parametrize("k", [1, -1])
def test_christoffel_symbols_of_a_conformal_metric(k):
    """g = e^{2f} I: Γ^k_ij = δ_ki ∂_j f + δ_kj ∂_i f - δ_ij ∂_k f, with ∇f = -2k x / (1 +
    k|x|²).
    """
    x = 0.3 * torch.randn(2, 3, 4)
    df, eye = -2 * k * x / (1 + k * x.square().sum(-1, keepdim=True)), torch.eye(4)
    expected = torch.einsum("ki,...j->...kij", eye, df) + torch.einsum("kj,...i->...kij", eye, df)
    expected = expected - torch.einsum("ij,...k->...kij", eye, df)
    assert torch.allclose(
        geometry.christoffel(partial(constant_curvature, k), x), expected, atol=1e-12
    )


def test_the_acceleration_is_the_contraction():
    metric = learned()
    x, v = torch.randn(2, 2, 3, 5)
    symbols = geometry.christoffel(metric, x)
    assert symbols.shape == (2, 3, 5, 5, 5)
    assert torch.allclose(symbols, symbols.transpose(-1, -2), atol=1e-12)
    found = geometry.acceleration(metric, x, v)
    assert torch.allclose(found, -torch.einsum("...kij,...i,...j->...k", symbols, v, v), atol=1e-11)
    assert found.abs().max() > 0.1
    assert torch.allclose(geometry.acceleration(metric, x[1, 2], v[1, 2]), found[1, 2], atol=1e-12)


class Largest(TorchDispatchMode):
    """The numbers in the largest tensor that any operation returns."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numbers = max(
            [self.numbers, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))]
        )
        return out


def test_the_acceleration_never_holds_the_symbols():
    """Forwards and backwards; the definition does, so the count would see them."""
    metric = model.LearnedMetric(12, 2, 3)
    x, v = torch.randn(2, 10, 12).requires_grad_()
    with Largest() as largest:
        geometry.acceleration(metric, x, v).sum().backward()
    assert largest.numbers == 10 * 12**2
    with Largest() as largest:
        geometry.christoffel(metric, x)
    assert largest.numbers >= 10 * 12**3


def test_both_ways_are_measured():
    metric, (x, v) = learned(), torch.randn(2, 3, 5)
    ways = [way(metric, x, v) for way in cost.WAYS.values()]
    assert torch.allclose(*ways, atol=1e-11)
    for way in cost.WAYS:
        seconds, grown = cost.measure(2, way, points=2, rank=1, hidden=2)
        assert 0 < seconds < 1
        assert 0 <= grown < 100


def test_without_curvature_lines_are_straight():
    """To the last bit, for a metric of any constant value; also where the metric does not look at x
    at all.
    """
    x, v = torch.randn(2, 3, 4)
    root = torch.randn(4, 4)
    for g in (torch.eye(4), root @ root.T + torch.eye(4)):
        for metric in (lambda x, g=g: g.expand(*x.shape, 4), lambda x, g=g: g + 0 * x[..., None]):
            assert torch.equal(
                torch.stack(geometry.geodesic(metric, x, v, 1)), torch.stack((x + v, v))
            )
            assert torch.allclose(
                geometry.geodesic(metric, x, v, 7, 0.3)[0], x + 0.3 * v, atol=1e-15
            )
            assert not geometry.christoffel(metric, x).any()


def test_the_learned_metric_is_positive_definite():
    metric = learned(6, 3)
    torch.nn.init.normal_(metric.out.weight, std=100)
    g = metric(100 * torch.randn(2, 50, 6))
    assert g.shape == (2, 50, 6, 6)
    assert torch.allclose(g, g.mT, rtol=0, atol=1e-14)
    eigenvalues = torch.linalg.eigvalsh(g)
    assert eigenvalues.min() >= torch.tensor(-1.0).exp() - 1e-12
    assert eigenvalues.max() <= torch.tensor(1.0).exp() + 3 + 1e-12
    assert eigenvalues.max() / eigenvalues.min() > 5
    # diag(exp s) + U Uᵀ and no more: off the diagonal the rank is that of U
    s = torch.tanh(metric.out(torch.tanh(metric.hidden(torch.ones(6)))))[:6]
    assert torch.linalg.matrix_rank(metric(torch.ones(6)) - torch.diag(s.exp()), tol=1e-9) == 3
    fresh = model.LearnedMetric(16, 4, 32)(torch.randn(20, 16)) - torch.eye(16)
    assert 1e-3 < fresh.abs().max() < 0.3


def test_gradients_through_a_geodesic():
    metric = learned(3, 1, 4)
    x, v = torch.randn(2, 2, 3)
    names, weights = zip(*metric.named_parameters())

    def end(x, v, *weights):
        def g(x):
            return torch.func.functional_call(metric, dict(zip(names, weights)), (x,))

        return geometry.geodesic(g, x, v, 2)

    assert torch.autograd.gradcheck(end, (x.requires_grad_(), v.requires_grad_(), *weights))


def language_model(**options):
    """With weights under which the motion is curved."""
    torch.manual_seed(1)
    lm = model.GeodesicLanguageModel(**SMALL, **options)
    if lm.metric is not None:
        torch.nn.init.normal_(lm.metric.out.weight, std=0.5)
    return lm


def gradients(lm, loss):
    lm.zero_grad()
    loss.backward()
    return [p.grad for p in lm.parameters()]


@pytest.mark.parametrize("flat", [False, True])
def test_whole_is_split_is_step(flat):
    """In logits, velocities and gradients."""
    lm = language_model(flat=flat)
    ids = torch.randint(0, 11, (3, 7))
    target = torch.randn(3, 7, 11)
    whole, velocity = lm(ids)
    expected = gradients(lm, (whole * target).sum() + velocity.sum())
    for sizes in ((3, 4), (1, 5, 1), (1,) * 7):
        parts, state = [], None
        for part in ids.split(sizes, 1):
            logits, state = lm(part, state)
            parts.append(logits)
        assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-12)
        assert torch.allclose(state, velocity, atol=1e-12)
        found = gradients(lm, (torch.cat(parts, 1) * target).sum() + state.sum())
        assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(found, expected))


def test_the_model_is_its_formula():
    """Token by token and row by row; and it looks at every earlier token, at no later one, at no
    other row.
    """
    lm = language_model()
    ids = torch.randint(0, 11, (2, 6))
    logits, velocity = lm(ids)
    for row in range(2):
        w = torch.zeros(6)
        for t in range(6):
            e = lm.embedding[ids[row, t]]
            f, c = (lm.update.weight @ torch.cat((e, w)) + lm.update.bias).split(6)
            n = torch.sigmoid(f) * w + c
            x, w = geometry.geodesic(lm.metric, e, lm.speed * n / n.norm(), 2)
            expected = torch.stack(
                [lm.scale * (x @ word) + b for word, b in zip(lm.embedding, lm.bias)]
            )
            assert torch.allclose(logits[row, t], expected, atol=1e-12)
        assert torch.allclose(velocity[row], w, atol=1e-12)
    for t in range(6):
        other = ids.clone()
        other[0, t] = (ids[0, t] + 1) % 11
        changed = (lm(other)[0] - logits).abs().amax(-1)
        assert (changed[0, :t] < 1e-12).all()
        assert changed[0, t:].min() > 1e-9
        assert changed[1].max() < 1e-12


class Identity(torch.nn.Module):
    def forward(self, x):
        return torch.eye(x.shape[-1]).expand(*x.shape, x.shape[-1])


def test_flat_is_the_identity_metric():
    """And a model with a metric differs from the flat one, seeded alike, by its metric alone."""
    ids = torch.randint(0, 11, (2, 5))
    flat, curved = language_model(flat=True), language_model()
    straight, _ = flat(ids)
    assert (curved(ids)[0] - straight).abs().max() > 1e-2
    curved.metric = Identity()
    assert torch.allclose(curved(ids)[0], straight, atol=1e-12)


def test_checkpointing_changes_nothing():
    ids, target = torch.randint(0, 11, (2, 5)), torch.randn(2, 5, 11)
    plain, saving = language_model(), language_model(checkpointing=True)
    (a, v), (b, w) = plain(ids), saving(ids)
    assert torch.equal(a, b)
    assert torch.equal(v, w)
    found, expected = gradients(saving, (b * target).sum()), gradients(plain, (a * target).sum())
    assert all(g.any() and torch.allclose(f, g, atol=1e-12) for f, g in zip(found, expected))


def test_errors():
    for name in ("vocab_size", "dim", "rank", "hidden", "steps"):
        with pytest.raises(ValueError, match=f"{name}: expected at least 1, got 0"):
            model.GeodesicLanguageModel(**{**SMALL, name: 0})
    with pytest.raises(ValueError, match="steps: expected at least 1, got 0"):
        geometry.geodesic(polar, torch.ones(2), torch.ones(2), 0)
    lm = language_model()
    for shape in ((5,), (2, 0), (1, 2, 3)):
        with pytest.raises(ValueError, match=r"ids: expected \[B, T\] with T at least 1, got \["):
            lm(torch.zeros(shape, dtype=torch.long))
    for shape in ((6,), (1, 6), (2, 5)):
        with pytest.raises(ValueError, match=r"velocity: expected \[B, D\] = \[2, 6\], got \["):
            lm(torch.zeros(2, 3, dtype=torch.long), torch.zeros(shape))


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the cat sat on the mat. " * 200)
    return path


TINY = [
    f"--{n}={v}"
    for n, v in {"dim": 8, "rank": 2, "hidden": 8, "batch": 8, "context": 4, "heldout": 640}.items()
]
TINY.append("--learning-rate=0.03")


def test_training(text, capsys):
    """Both models learn a text that repeats itself; the last line says it all."""
    torch.set_default_dtype(torch.float32)
    results = train.main(["--data", str(text), *TINY, "--steps", "25"])
    for found in results.values():
        assert found["first loss, bits"] > 6
        assert found["last loss, bits"] < 4.5
        assert found["bits per byte"] < 4.5
    straight, geodesic = results["straight"], results["geodesic"]
    assert geodesic["parameters"] > straight["parameters"]
    assert 0 < geodesic["energy drift"] < 0.1
    assert 0 < geodesic["departure"] < 1
    assert geodesic["bits per byte, straightened"] != geodesic["bits per byte"]
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[-1])["results"] == results
    assert lines[0].startswith("straight ")
    again = train.main(
        ["--data", str(text), *TINY, "--steps", "25", "--models", "geodesic", "--checkpointing"]
    )
    assert again["geodesic"]["bits per byte"] == pytest.approx(geodesic["bits per byte"], abs=1e-3)


def test_bits_per_byte_is_the_code_length():
    """Against one byte at a time, over windows that do not divide the rows."""
    lm = model.GeodesicLanguageModel(256, 4, 1, hidden=4)
    rows = torch.randint(0, 256, (3, 18))
    bits, velocity = 0.0, None
    for t in range(17):
        logits, velocity = lm(rows[:, t : t + 1], velocity)
        bits -= float(logits.softmax(-1)[range(3), 0, rows[:, t + 1]].log2().sum().detach())
    assert train.bits_per_byte(lm, rows, window=5) == pytest.approx(bits / (3 * 17), rel=1e-10)


def test_the_last_tenth_is_held_out():
    text = bytes(i % 251 for i in range(5000))
    options = train.parse(["--batch", "4", "--context", "8", "--heldout", "200"])
    rows, heldout = train.data(text, options)
    assert bytes(rows.flatten().tolist()) == text[:4500]
    assert heldout.shape == (64, 3)
    assert bytes(heldout[9].tolist()) == text[4500 + 9 * 7 :][:3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "/no/such/file"], "data: No such file or directory: /no/such/file"),
        (["--data", str(FOLDER)], f"data: Is a directory: {FOLDER}"),
        (
            ["--data", "TEXT", "--batch", "600"],
            "data: expected at least 22,000 bytes for this batch and context, got 4,800",
        ),
        (["--dim", "0"], "dim: expected at least 1, got 0"),
        (["--rank", "-1"], "rank: expected at least 1, got -1"),
        (["--rk4-steps", "0"], "rk4-steps: expected at least 1, got 0"),
        (["--steps", "0"], "steps: expected at least 1, got 0"),
        (["--learning-rate", "nan"], "learning-rate: expected a positive number, got nan"),
        (["--metric-rate", "-1"], "metric-rate: expected a positive number, got -1.0"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_input(arguments, message, text):
    arguments = [str(text) if argument == "TEXT" else argument for argument in arguments]
    with pytest.raises(SystemExit) as caught:
        train.main(["--context", "32", *arguments])
    assert caught.value.code == message


def test_divergence_is_said(text):
    torch.set_default_dtype(torch.float32)
    with pytest.raises(SystemExit) as caught:
        train.main(["--data", str(text), *TINY, "--steps", "20", "--learning-rate", "1e30"])
    assert "loss not finite at step" in caught.value.code


def test_as_a_program(tmp_path):
    """From any folder; one line of error and no traceback."""
    command = [sys.executable, str(FOLDER / "train.py"), "--data", "missing"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr == "data: No such file or directory: missing\n"
