"""Instructions of attention in programs: one token onto a state."""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor

from ..spec import feature_count
from .attention import ACTIVATIONS
from .instructions import Instructions, Unsuitable, Vector
from .library import CHUNK, MAX_ORDER, Attention, MixedChunk
from .mixed_chunk import ACTIVATIONS as MIXED_ACTIVATIONS


class AttentionInstructions(Instructions):
    """The instructions of attention, with states."""

    def attend(
        self,
        query: Vector,
        key: Vector,
        value: Vector,
        heads: int,
        groups: int,
        *,
        order: int,
        constant_term: bool,
        activation: str,
        scale: float,
        normalize: bool,
        log_decay: Vector | None = None,
    ) -> Vector:
        """Linear or Taylor attention; log_decay: one for each key/value head.

        Its states are the numerator ``[G, F, V]`` and, if normalised, the denominator ``[G, F]``.
        """
        K, V = query.size // heads, value.size // groups
        features = math.comb(K + order, order) if order else K
        sizes = query.size == heads * K and key.size == groups * K and value.size == groups * V
        if log_decay is not None:
            sizes = sizes and log_decay.size == groups
        if not sizes or order > MAX_ORDER or activation not in ACTIVATIONS or features >= 2**31:
            raise Unsuitable
        F = feature_count(K, order, constant_term)
        state = self._add_state(groups, F, V, dtype=torch.float32)
        if normalize:
            self._add_state(groups, F, dtype=torch.float32)
        arguments = Attention(
            H=heads, G=groups, T=1, S=1, K=K, V=V, F=F, chunk=CHUNK, span=1, order=order,
            constant_term=constant_term, activation=ACTIVATIONS.index(activation),
            normalize=normalize, is_causal=True, scale=scale,
        )  # fmt: skip
        y = self.vector(heads * V)
        self._add_instruction(
            "attend", source=query, second=key, third=value, target=y, state=state,
            fourth=-1 if log_decay is None else log_decay,
        )  # fmt: skip
        self._arguments.append(arguments)
        self._instructions[-1].attention = ctypes.pointer(arguments)
        return y

    def attend_softmax(
        self, query: Vector, key: Vector, value: Vector, groups: int, dim: int, window: int | None
    ) -> Vector:
        """Softmax attention with heads of `dim` numbers to the last `window` tokens, or to all.

        Its states are the keys and the values before, ``[G, S, dim]`` each.
        """
        heads = query.size // dim
        if window is not None and window < 2:
            raise Unsuitable
        if heads * dim != query.size or key.size != groups * dim or value.size != key.size:
            raise Unsuitable
        sums, y, state = self.vector(2 * heads), self.vector(query.size), len(self.states)
        past, self.windows[state] = len(self.windows), window
        for _ in range(2):
            self._add_state(groups, -1, dim)
        self._add_instruction(
            "softmax", source=query, second=key, third=value, fourth=sums, target=y, state=state,
            n=heads, k=dim, groups=groups, past=past, scalar=dim**-0.5,
        )  # fmt: skip
        return y

    def attend_chunks(
        self,
        copies: Vector,
        value: Vector,
        group_size: int,
        activation: str,
        bias: tuple[Tensor, Tensor, float] | None,
    ) -> Vector:
        """Mixed chunk attention with one head; copies: quadratic query, linear query, quadratic
        key and linear key, one after another.

        bias: learned numbers of buckets, the bucket of each distance in a group, and a factor.
        Its states are the numerator, and the open group's quadratic keys, linear keys and values.
        """
        K, V, g = copies.size // 4, value.size, group_size
        self.needs_position = True
        state = self._add_state(1, K, V, dtype=torch.float32)
        for size in (K, K, V):
            self._add_state(1, g, size, dtype=torch.float32)
        self.replaced += range(state, state + 4)
        arguments = MixedChunk(
            H=1, G=1, T=1, K=K, L=K, V=V, size=g, span=g, is_causal=True, summed=True,
            activation=MIXED_ACTIVATIONS.index(activation),
        )  # fmt: skip
        weight, buckets, factor = bias or (None, None, 1.0)
        if weight is not None and buckets is not None:
            self._keep_weight(weight, (weight.shape[0], 1))
            self._weights.append(buckets)
        y = self.vector(V)
        self._add_instruction(
            "mixed", source=copies, second=value, target=y, state=state, weight=weight,
            buckets=buckets, scalar=factor,
        )  # fmt: skip
        self._arguments.append(arguments)
        self._instructions[-1].mixed = ctypes.pointer(arguments)
        return y

    def add_position_logits(
        self,
        x: Vector | None,
        frequency: Tensor,
        phase: Tensor,
        amplitude: Tensor,
        factor: float,
    ) -> Vector:
        """``x_h + Σ_m amplitude sin(frequency · factor · position + phase)``, each ``[H, M]``."""
        H, M = frequency.shape
        self.needs_position = True
        for weight in (frequency, phase, amplitude):
            self._keep_weight(weight, (H if x is None else x.size, M))
        y = self.vector(H)
        self._add_instruction(
            "position_logits", source=x or y, add=x is not None, target=y, n=H, k=M, scalar=factor,
            weight=frequency, bias=phase, amplitudes=amplitude,
            fourth=self._widening(3 * H * M, frequency),
        )  # fmt: skip
        return y

    def attend_elita(self, key: Vector, query: Vector, own: Vector, value: Vector) -> Vector:
        """ELiTA's attention; key, query, own: the logits c, r and s of each head.

        Its states are the log-weight ``[H]`` and the mean ``[H, V]``, in fp64.
        """
        H = key.size
        if query.size != H or own.size != H or value.size % H:
            raise Unsuitable
        V, y = value.size // H, self.vector(value.size)
        state = self._add_state(H, dtype=torch.float64, initial=-math.inf)
        self._add_state(H, V, dtype=torch.float64)
        self._add_instruction(
            "elita", source=key, second=query, third=own, fourth=value, target=y, state=state, n=H,
            k=V,
        )  # fmt: skip
        return y
