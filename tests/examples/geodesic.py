"""The geodesic experiment's modules, and charts, metrics and models to test them on."""

import importlib
import sys
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional as F

FOLDER = Path(__file__).parents[2] / "examples" / "geodesic"
sys.path.insert(0, str(FOLDER))
geometry, model, train, cost = (
    importlib.import_module(name) for name in ("geometry", "model", "train", "cost")
)
sys.path.remove(str(FOLDER))
SMALL = {"vocab_size": 11, "dim": 6, "rank": 2, "hidden": 8, "steps": 2}


def diagonal(values):
    return torch.diag_embed(torch.stack(values, -1))


def constant_curvature(k, x):
    """The metric of a sphere (k = 1), hyperbolic ball (k = -1) or flat space, stereographically."""
    factor = 4 / (1 + k * x.square().sum(-1)) ** 2
    return factor[..., None, None] * torch.eye(x.shape[-1])


def embedded_ball(k, x):
    """The point on the sphere or the hyperboloid, whose axis is the last coordinate."""
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
    """Three points and velocities that lead neither to a pole nor near the edge of the ball."""
    x = (
        torch.tensor([[1.1, 0.3], [1.7, -2.0], [1.9, 1.0]])
        if chart == "polar"
        else 0.2 * torch.randn(3, dim)
    )
    return x, 0.5 * F.normalize(torch.randn(3, dim), dim=-1)


def language_model(**options):
    """With weights under which the motion is curved."""
    torch.manual_seed(1)
    lm = model.GeodesicLanguageModel(**SMALL, **options)
    if lm.metric is not None:
        torch.nn.init.normal_(lm.metric.out.weight, std=0.5)
    return lm
