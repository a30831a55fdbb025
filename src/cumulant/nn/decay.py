"""Log decays of tokens, by which causal linear and Taylor attention forget.

A decay γ between 0 and 1 multiplies the weights of all earlier tokens. Its span is the number of
tokens after which a weight is 1/e of its value: ``log γ = -1 / span``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.project import project_wide
from ..ops.step import Vector
from .checks import check_counts, check_floats
from .step import StepBuilder, known_to_programs

START = 0.999  # the decay at which gates start: their heads remember about 1,000 tokens


class Decay(nn.Module):
    """``x [B, T, D]`` -> log decays ``[B, G, T]``, at most 0, in fp32 (fp64 for fp64).

    Low precision of x, of the weights or of autocast does not lower that of the log decays.
    """

    def __init__(self, num_kv_heads: int, spans: Sequence[float] | None, dim: int | None = None):
        super().__init__()
        check_counts(num_kv_heads=num_kv_heads, dim=dim)
        self.num_kv_heads, self.dim = num_kv_heads, dim
        if spans is not None:
            spans = check_spans("spans", spans, num_kv_heads, trained=dim is not None)
        self.spans = spans
        for name, value in self.initial().items():
            setattr(self, name, nn.Parameter(value))

    def initial(self) -> dict[str, Tensor]:
        """The initial value of each parameter."""
        return {}

    def reset_parameters(self) -> None:
        with torch.no_grad():
            for name, value in self.initial().items():
                getattr(self, name).copy_(value)

    def check(self, x: Tensor) -> None:
        check_floats(x, "[B, T, D]")
        if x.dim() != 3 or self.dim not in (None, x.shape[2]):
            size = "" if self.dim is None else f" with D={self.dim}"
            raise ValueError(f"x: expected [B, T, D]{size}, got {list(x.shape)}")

    def extra_repr(self) -> str:
        dim = "" if self.dim is None else f"{self.dim}, "
        return f"{dim}{self.num_kv_heads}, spans={self.spans}"


@known_to_programs
class FixedDecay(Decay):
    """A constant decay for each head, which is not trained.

    By default ``γ_g = 1 - 2^(-5 - g)`` for head g: spans of 31.5, 63.5, 127.5, ... tokens. With
    `spans`, ``log γ_g = -1 / spans[g]``; an infinite span forgets nothing.

    It has no parameters and no buffers.

    Source: Sun et al. 2023, "Retentive Network", multi-scale retention.

    Args:
        num_kv_heads: key/value heads G.
        spans: G numbers of tokens, for example ``(64, 256, 1024, math.inf)``.
    """

    def __init__(self, num_kv_heads: int, spans: Sequence[float] | None = None):
        super().__init__(num_kv_heads, spans)

    def log_decays(self) -> list[float]:
        """One for each head."""
        if self.spans is None:
            return [math.log1p(-(2.0 ** (-5 - g))) for g in range(self.num_kv_heads)]
        return [-1 / span for span in self.spans]

    def forward(self, x: Tensor) -> Tensor:
        self.check(x)
        dtype = torch.promote_types(x.dtype, torch.float32)
        decays = torch.tensor(self.log_decays(), dtype=dtype, device=x.device)
        return decays[:, None].expand(x.shape[0], self.num_kv_heads, x.shape[1])

    def emit_step(self, builder: StepBuilder, x: Vector, residual: Vector | None) -> Vector:
        """See `cumulant.nn.step.EmitsStep`."""
        builder.rely_on(self)
        constants = torch.tensor(self.log_decays(), dtype=torch.float32)
        return builder.program.decay("fixed", None, constants)


@known_to_programs
class GatedDecay(Decay):
    """Decays that depend on the token: ``log γ = logsigmoid(w_g · x_t + b_g) / divisor``.

    w starts at zero and b so that γ is 0.999, or ``exp(-1 / spans[g])``. So all tokens decay alike
    at first, and a step of training changes w and b.

    Sources: Yang et al. 2023, "Gated Linear Attention Transformers", whose gates have a divisor τ;
    `simple_gla` of flash-linear-attention, with one gate for each head.

    Args:
        dim: model dim D.
        num_kv_heads: key/value heads G, each with its own w ``[D]`` and b.
        spans: the G spans at the start, in tokens; by default that of γ = 0.999.
        divisor: brings γ nearer to 1; flash-linear-attention calls it `gate_logit_normalizer`.
    """

    weight: Tensor
    bias: Tensor

    def __init__(
        self,
        dim: int,
        num_kv_heads: int,
        spans: Sequence[float] | None = None,
        divisor: float = 1.0,
    ):
        check_divisor("divisor", divisor)
        self.divisor = divisor
        super().__init__(num_kv_heads, spans, dim)

    def initial(self) -> dict[str, Tensor]:
        # sigmoid(b) = γ^divisor, with log γ = -rate
        rates = [-math.log(START)] * self.num_kv_heads
        rates = rates if self.spans is None else [1 / span for span in self.spans]
        rate = torch.tensor(rates, dtype=torch.float64) * self.divisor
        # -log(e^r - 1), where e^r may overflow
        bias = -rate - (-torch.expm1(-rate)).log()
        return {
            "weight": torch.zeros(self.num_kv_heads, self.dim or 0),
            "bias": bias.to(torch.get_default_dtype()),
        }

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, divisor={self.divisor}"

    def forward(self, x: Tensor) -> Tensor:
        self.check(x)
        logit = project_wide(x, self.weight, self.bias)
        return F.logsigmoid(logit).mT / self.divisor

    def emit_step(self, builder: StepBuilder, x: Vector, residual: Vector | None) -> Vector:
        """See `cumulant.nn.step.EmitsStep`."""
        builder.rely_on(self)
        logit = builder.program.matrix(x, self.weight, self.bias)
        return builder.program.decay("gated", logit, factor=1 / self.divisor)


@known_to_programs
class Mamba2Decay(Decay):
    """Decays of Mamba-2: ``log γ = -exp(A_log_g) · softplus(w_g · x_t + dt_bias_g)``.

    It has Mamba-2's initial values: ``exp(A_log)`` is drawn between 1 and 16, and
    ``softplus(dt_bias)`` log-uniformly between 0.001 and 0.1. With `spans`, dt_bias is such that γ
    is ``exp(-1 / spans[g])``. w starts at zero.

    Mamba-2 multiplies its values by ``softplus(...)`` as well, which this attention does not;
    `cumulant.interop.Mamba2Mixer` is its whole layer.

    Source: Dao and Gu 2024, "Transformers are SSMs".

    Args:
        dim: model dim D.
        num_kv_heads: key/value heads G, each with its own w ``[D]``, A_log and dt_bias.
        spans: the G spans at the start, in tokens; by default they are drawn.
    """

    weight: Tensor
    A_log: Tensor
    dt_bias: Tensor

    def __init__(self, dim: int, num_kv_heads: int, spans: Sequence[float] | None = None):
        super().__init__(num_kv_heads, spans, dim)

    def initial(self) -> dict[str, Tensor]:
        groups = self.num_kv_heads
        rate = torch.empty(groups, dtype=torch.float64).uniform_(1, 16)
        log_step = torch.empty(groups, dtype=torch.float64)
        if self.spans is None:
            step = log_step.uniform_(math.log(0.001), math.log(0.1)).exp()
        else:
            step = 1 / (rate * torch.tensor(self.spans, dtype=torch.float64))
        dtype = torch.get_default_dtype()
        return {
            "weight": torch.zeros(groups, self.dim or 0),
            "A_log": rate.log().to(dtype),
            # the inverse of softplus
            "dt_bias": (step + (-torch.expm1(-step)).log()).to(dtype),
        }

    def forward(self, x: Tensor) -> Tensor:
        self.check(x)
        logit = project_wide(x, self.weight, self.dt_bias)
        return (F.softplus(logit) * -self.A_log.to(logit.dtype).exp()).mT

    def emit_step(self, builder: StepBuilder, x: Vector, residual: Vector | None) -> Vector:
        """See `cumulant.nn.step.EmitsStep`."""
        builder.rely_on(self)
        logit = builder.program.matrix(x, self.weight, self.dt_bias)
        return builder.program.decay("mamba2", logit, self.A_log)


DECAYS = ("none", "fixed", "gated", "mamba2")


def log_decays(decay: nn.Module, x: Tensor) -> Tensor:
    """Those of x ``[B, T, D]``; the operation checks what a module of one's own returns."""
    found = decay(x)
    if not isinstance(found, Tensor):
        raise TypeError(
            f"decay: expected log decays [B, G, T] from {type(decay).__name__}, got"
            f" {type(found).__name__}"
        )
    return found


def make_decay(
    decay: str | nn.Module,
    dim: int,
    num_kv_heads: int,
    *,
    is_causal: bool = True,
    spans: Sequence[float] | None = None,
    divisor: float = 1.0,
) -> nn.Module | None:
    """The decays of a mixer, by name or a module of one's own; None for none."""
    if isinstance(decay, str) and decay == "none":
        return None
    if not isinstance(decay, nn.Module) and decay not in DECAYS:
        raise ValueError(
            f"decay: expected one of {', '.join(DECAYS)} or a module [B, T, D] -> [B, G, T], got"
            f" {decay!r}"
        )
    if not is_causal:
        raise ValueError(
            "decay: decays follow time, so they need is_causal=True; without it, tokens have no"
            " order"
        )
    if isinstance(decay, nn.Module):
        if isinstance(decay, Decay):
            if decay.num_kv_heads != num_kv_heads:
                raise ValueError(
                    f"decay: expected a module for {num_kv_heads} key/value heads, got one for"
                    f" {decay.num_kv_heads}"
                )
            if decay.dim not in (None, dim):
                raise ValueError(f"decay: expected a module for D={dim}, got one for D={decay.dim}")
        return decay
    if decay == "fixed":
        return FixedDecay(num_kv_heads, spans)
    if decay == "gated":
        return GatedDecay(dim, num_kv_heads, spans, divisor)
    return Mamba2Decay(dim, num_kv_heads, spans)


def check_spans(name: str, spans: object, count: int, *, trained: bool) -> tuple[float, ...]:
    """There is one span for each of `count` key/value heads, a number of tokens above 0.

    trained: they are where gates start, and finite.
    """
    if not isinstance(spans, Sequence) or isinstance(spans, str):
        raise TypeError(
            f"{name}: expected a sequence of numbers of tokens, got {type(spans).__name__}"
        )
    for span in spans:
        if isinstance(span, bool) or not isinstance(span, int | float) or not span > 0:
            raise ValueError(f"{name}: expected numbers of tokens above 0, got {span!r}")
    if len(spans) != count:
        raise ValueError(
            f"{name}: expected {count} numbers, one for each key/value head, got {len(spans)}"
        )
    if trained and math.inf in spans:
        raise ValueError(
            f"{name}: gates start at finite spans, as an infinite one has no gradient; got"
            f" {list(spans)}"
        )
    return tuple(float(span) for span in spans)


def check_divisor(name: str, divisor: object) -> None:
    """The divisor of a gate is a finite number above 0."""
    number = isinstance(divisor, int | float) and not isinstance(divisor, bool)
    if not number or not 0 < divisor < math.inf:  # type: ignore[operator]
        raise ValueError(f"{name}: expected a finite number above 0, got {divisor!r}")
