"""The geodesic experiment's geometry against closed forms."""

from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..quick import slow_but
from .geodesic import (
    CASES,
    CHARTS,
    constant_curvature,
    cost,
    geometry,
    learned,
    model,
    polar,
    start,
)


@pytest.mark.parametrize(
    ("chart", "dim"),
    [c if c[1] == 2 else pytest.param(*c, marks=pytest.mark.slow) for c in CASES],
)
def test_geodesics_are_great_circles(chart, dim):
    """The closed form is p cos ωt + u/ω sin ωt; on the hyperboloid, cosh and sinh."""
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


@pytest.mark.parametrize("chart", [pytest.param("sphere", marks=pytest.mark.slow), "polar"])
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


@pytest.mark.parametrize("chart", slow_but(("polar", "learned"), [*CHARTS, "learned"]))
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
    """Γ^k_ij = δ_ki ∂_j f + δ_kj ∂_i f - δ_ij ∂_k f for g = e^{2f} I.

    Here ∇f = -2k x / (1 + k|x|²).
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
    """Neither pass holds them; the count does find them in the definition."""
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
    """A constant metric gives straight lines to the last bit, even one that ignores x."""
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


def test_gradients_through_a_geodesic():
    metric = learned(3, 1, 4)
    x, v = torch.randn(2, 2, 3)
    names, weights = zip(*metric.named_parameters())

    def end(x, v, *weights):
        def g(x):
            return torch.func.functional_call(metric, dict(zip(names, weights)), (x,))

        return geometry.geodesic(g, x, v, 2)

    assert torch.autograd.gradcheck(end, (x.requires_grad_(), v.requires_grad_(), *weights))
