"""Mamba-2's mixer, with the weights of mamba-ssm or transformers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..nn.checks import check_count, check_counts
from ..nn.projection import project
from ..ops.state import LinearState
from .gated_mixer import (
    GatedMixer,
    GatedNorm,
    SiluConvolution,
    choose_options,
    read_taps,
)
from .state_space import ssd
from .weights import Weights

PACKAGE = "mamba-ssm or transformers"


class Mamba2Mixer(GatedMixer):
    """The mixer of Mamba-2: `ssd` between a convolution and a gated norm.

    ``z, (x, B, C), dt = W_in u``; ``x, B, C = silu(conv(x, B, C))``; and the output is
    ``W_out RMSNorm(ssd(x, softplus(dt + dt_bias), -exp(A_log), B, C, D) ⊙ silu(z))``.

    It is causal and has the protocol of `cumulant.nn`; its state is a `KernelAttentionState` with
    the sums of `ssd`.

    Args:
        dim: model dim.
        num_heads: heads H of x.
        head_dim: channels P of a head.
        state_dim: channels N of B and C.
        num_groups: groups G of heads that share B and C.
        conv_size: taps of the convolution.
        conv_bias: bias of the convolution.
        bias: biases of the projections.
        skip_size: 1 for one D a head, P for one a channel.
        norm_groups: parts of the output that are normalised on their own, by default G; 0 for no
            norm but the gate.
        norm_eps: the norm's epsilon.
        norm_before_gate: the norm reads the output of `ssd`, and the gate multiplies its result.
        dt_limit: least and greatest step, after softplus.
        impl: as in `cumulant.linear_attention`.

    Source: Dao and Gu 2024, "Transformers are SSMs", section 7.
    """

    conv: SiluConvolution
    first_proj = "in_proj"

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        head_dim: int = 64,
        state_dim: int = 128,
        num_groups: int = 1,
        conv_size: int = 4,
        conv_bias: bool = True,
        bias: bool = False,
        skip_size: int = 1,
        norm_groups: int | None = None,
        norm_eps: float = 1e-5,
        norm_before_gate: bool = False,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        impl: str = "auto",
    ):
        super().__init__(dim)
        check_counts(dim=dim, num_heads=num_heads, head_dim=head_dim, state_dim=state_dim)
        check_counts(num_groups=num_groups, conv_size=conv_size)
        norm_groups = num_groups if norm_groups is None else norm_groups
        check_count("norm_groups", norm_groups, 0)
        inner, shared = num_heads * head_dim, num_groups * state_dim
        if num_heads % num_groups:
            raise ValueError(f"num_groups: {num_groups} must divide the {num_heads} heads")
        if norm_groups and inner % norm_groups:
            raise ValueError(f"norm_groups: {norm_groups} must divide the {inner} channels")
        if not 0 <= dt_limit[0] <= dt_limit[1]:
            raise ValueError(f"dt_limit: expected 0 <= least <= greatest, got {dt_limit}")
        self.num_heads, self.head_dim, self.num_groups = num_heads, head_dim, num_groups
        self.state_dim, self.dt_limit, self.impl = state_dim, dt_limit, impl
        self.in_proj = nn.Linear(dim, 2 * inner + 2 * shared + num_heads, bias=bias)
        channels = inner + 2 * shared
        self.conv = SiluConvolution(channels, conv_size, bias=conv_bias)
        self.A_log = nn.Parameter(torch.arange(1, num_heads + 1).float().log())
        self.dt_bias = nn.Parameter(torch.full((num_heads,), math.log(math.expm1(0.01))))
        self.D = nn.Parameter(torch.ones(num_heads * skip_size))
        self.norm = (
            GatedNorm(
                inner // norm_groups, norm_groups, eps=norm_eps, gate_first=not norm_before_gate
            )
            if norm_groups
            else None
        )
        self.out_proj = nn.Linear(inner, dim, bias=bias)

    def mix(
        self, x: Tensor, local: dict[str, Tensor | None], rows: dict[str, Any]
    ) -> tuple[Tensor, LinearState | None, Tensor | None]:
        """See `GatedMixer.mix`."""
        inner, shared = self.num_heads * self.head_dim, self.num_groups * self.state_dim
        projected = project(self.in_proj, x)
        z, *mixed, dt = projected.split([inner, inner, shared, shared, self.num_heads], -1)
        *mixed, tail = self.conv(*mixed, **local)
        heads = self.num_heads, self.num_groups, self.num_groups
        values, B, C = (y.unflatten(-1, (n, -1)) for y, n in zip(mixed, heads, strict=True))
        wide = torch.promote_types(x.dtype, torch.float32)
        dt = F.softplus(dt.to(wide) + self.dt_bias.to(wide)).clamp(*self.dt_limit)
        attended = ssd(
            values,
            dt,
            -self.A_log.to(wide).exp(),
            B,
            C,
            self.D if len(self.D) == self.num_heads else self.D.view(self.num_heads, -1),
            impl=self.impl,
            **rows,
        )
        y, sums = attended if isinstance(attended, tuple) else (attended, None)
        y = y.flatten(2)
        y = y * F.silu(z) if self.norm is None else self.norm(y, z)
        return project(self.out_proj, y), sums, tail


def from_mamba2(
    source: nn.Module | Mapping[str, Tensor],
    *,
    ngroups: int | None = None,
    norm_groups: int | None = None,
    norm_eps: float | None = None,
    norm_before_gate: bool | None = None,
    dt_limit: tuple[float, float] | None = None,
) -> Mamba2Mixer:
    """Our module with the weights of Mamba-2's mixer.

    The source is a `Mamba2` or `Mamba2Simple` of mamba-ssm, or a `Mamba2Mixer` of transformers.
    Outputs agree to rounding, except where theirs depend on masked tokens (`docs/migrating.md`).

    Args:
        source: the layer, or its state dict. The options below are for a state dict only, since
            its weights do not determine them: a layer knows them.
        ngroups: groups of heads that share B and C. It must be given.
        norm_groups: parts of the output that are normalised on their own, by default `ngroups`. A
            `Mamba2Simple` has 1 if it was trained with ``use_mem_eff_path=False``.
        norm_eps: of the norm, by default 1e-5.
        norm_before_gate: by default False, as in both packages.
        dt_limit: least and greatest step, by default none.

    Raises:
        ValueError: a weight is missing, left over or of another shape (a layer with an MLP inside,
            ``d_ssm < d_inner``, and learnable initial states have no counterpart), or an option is
            missing that the weights do not determine.
    """
    given = {
        "ngroups": ngroups,
        "norm_groups": norm_groups,
        "norm_eps": norm_eps,
        "norm_before_gate": norm_before_gate,
        "dt_limit": dt_limit,
    }
    weights = Weights(source, PACKAGE)
    options = choose_options(source, given, _layer_options)
    if "ngroups" not in options:
        raise ValueError("ngroups: the weights do not tell it; give ngroups=...")
    loaded = {name: weights.pop_weight(name) for name in ("dt_bias", "A_log", "D")}
    for name in ("in_proj", "out_proj"):
        loaded[f"{name}.weight"] = weights.pop_weight(f"{name}.weight")
    loaded["conv.weight"] = read_taps(weights, "conv1d.weight")
    optional = {"conv1d.bias": "conv.bias", "norm.weight": "norm.weight"}
    optional |= {f"{name}.bias": f"{name}.bias" for name in ("in_proj", "out_proj")}
    for theirs, ours in optional.items():
        if theirs in weights:
            loaded[ours] = weights.pop_weight(theirs)
    if "norm.weight" not in loaded:
        options["norm_groups"] = 0
    module = Mamba2Mixer(**_sizes(loaded, options.pop("ngroups")), **options)
    weights.load(module, loaded, source)
    return module


def _sizes(loaded: dict[str, Tensor], groups: int) -> dict[str, Any]:
    """The sizes of a mixer, as its weights and the number of groups determine them."""
    dim, inner = loaded["out_proj.weight"].shape
    heads = len(loaded["dt_bias"])
    size, channels = loaded["conv.weight"].shape
    shared = channels - inner
    check_count("ngroups", groups)
    if len(loaded["in_proj.weight"]) != inner + channels + heads or inner % heads:
        raise ValueError(
            f"source: in_proj with {len(loaded['in_proj.weight'])} rows does not fit {inner} output"
            f" channels, {channels} channels of the convolution and {heads} heads; layers with an"
            " MLP inside (d_ssm below d_inner) have no counterpart"
        )
    if shared <= 0 or shared % (2 * groups) or heads % groups:
        raise ValueError(
            f"ngroups: {groups} must divide the {shared // 2} channels of B and the {heads} heads"
        )
    return {
        "dim": dim,
        "num_heads": heads,
        "head_dim": inner // heads,
        "state_dim": shared // (2 * groups),
        "num_groups": groups,
        "conv_size": size,
        "conv_bias": "conv.bias" in loaded,
        "bias": "in_proj.bias" in loaded,
        "skip_size": inner // heads if len(loaded["D"]) != heads else 1,
    }


def _layer_options(source: Any) -> dict[str, Any]:
    """The options of a layer, which its weights do not determine."""
    groups = getattr(source, "ngroups", getattr(source, "n_groups", None))
    if groups is None or not hasattr(source, "A_log"):
        raise TypeError(
            f"source: expected a Mamba-2 mixer of {PACKAGE}, got {type(source).__name__}"
        )
    if source.activation not in ("silu", "swish"):
        raise ValueError(f"source: its activation {source.activation!r} has no counterpart")
    norm: Any = getattr(source, "norm", None)
    size = getattr(norm, "group_size", None)
    if size is not None:
        norm_groups = len(norm.weight) // size
    else:  # the fused path of `Mamba2Simple` has groups that its norm does not know
        norm_groups = groups if getattr(source, "use_mem_eff_path", False) else 1
    limit = getattr(source, "dt_limit", getattr(source, "time_step_limit", None))
    return {
        "ngroups": groups,
        "norm_groups": norm_groups,
        "norm_eps": getattr(norm, "eps", getattr(norm, "variance_epsilon", None)),
        "norm_before_gate": getattr(norm, "norm_before_gate", None),
        "dt_limit": None if limit is None else tuple(limit),
    }
