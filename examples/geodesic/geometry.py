"""Geodesics of a metric given as a function: Christoffel symbols, acceleration, motion, energy.

A metric is a callable from points ``x [..., D]`` to symmetric positive definite matrices
``g(x) [..., D, D]``, each of its own point alone. A geodesic ``x(t)`` obeys (sums over repeated
indices)

    x''^k = -Γ^k_ij x'^i x'^j,    Γ^k_ij = ½ g^kl (∂_i g_jl + ∂_j g_il - ∂_l g_ij)

where ``g^kl`` is the inverse of ``g_kl``. Any standard text on Riemannian geometry has both
equations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor
from torch.func import jacfwd, jvp, vjp, vmap

Metric: TypeAlias = Callable[[Tensor], Tensor]


def christoffel(metric: Metric, x: Tensor) -> Tensor:
    """``Γ^k_ij`` at points ``x [..., D]``, as ``[..., k, i, j]``, by the definition."""
    d = x.shape[-1]
    points = x.reshape(-1, d)
    dg = vmap(jacfwd(metric))(points)  # dg[i, j, l] = ∂_l g_ij
    lower = 0.5 * (
        torch.einsum("njli->nlij", dg)
        + torch.einsum("nilj->nlij", dg)
        - torch.einsum("nijl->nlij", dg)
    )
    raised = torch.linalg.solve(metric(points), lower.reshape(-1, d, d * d))
    return raised.reshape(*x.shape, d, d)


def acceleration(metric: Metric, x: Tensor, v: Tensor) -> Tensor:
    """``-Γ^k_ij v^i v^j`` at ``x [..., D]`` for velocities ``v [..., D]``, without the symbols.

    Contracted with v twice, the three derivatives of the metric are ``(∂_v g) v`` (two of them,
    equal) and a gradient:

        -g⁻¹ [(∂_v g) v - ½ ∇_x (vᵀ g(x) v)]

    one Jacobian-vector product, one vector-Jacobian product and one solve. No tensor has more than
    D² numbers a point.
    """
    g, dg = jvp(metric, (x,), (v,))
    _, pull = vjp(metric, x)
    (slope,) = pull(v[..., :, None] * v[..., None, :])
    force = 0.5 * slope - (dg @ v[..., None])[..., 0]
    return torch.linalg.solve(g, force[..., None])[..., 0]


def geodesic(
    metric: Metric, x: Tensor, v: Tensor, steps: int, time: float = 1.0
) -> tuple[Tensor, Tensor]:
    """End point and end velocity, ``[..., D]`` each, of a geodesic after ``time``.

    It starts at ``x`` with velocity ``v``. There are ``steps`` of the classic Runge-Kutta method of
    order 4, with four accelerations each. The method's formulas for the pair (x, v) are written out
    for x, so that without acceleration a step is exactly ``x + h v``. The result is differentiable
    in ``x``, ``v`` and the metric's parameters.
    """
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}")
    h = time / steps
    for _ in range(steps):
        a1 = acceleration(metric, x, v)
        a2 = acceleration(metric, x + h / 2 * v, v + h / 2 * a1)
        a3 = acceleration(metric, x + h / 2 * (v + h / 2 * a1), v + h / 2 * a2)
        a4 = acceleration(metric, x + h * (v + h / 2 * a2), v + h * a3)
        x = x + h * v + h**2 / 6 * (a1 + a2 + a3)
        v = v + h / 6 * (a1 + 2 * a2 + 2 * a3 + a4)
    return x, v


def energy(metric: Metric, x: Tensor, v: Tensor) -> Tensor:
    """``vᵀ g(x) v``, ``[...]``: the squared speed, the same all along a geodesic."""
    return (v[..., None, :] @ metric(x) @ v[..., None])[..., 0, 0]
