"""Calls of linear and Taylor attention that are like one before, except for their numbers.

Options, shapes, strides and dtypes are the same. So everything is checked and laid out once, and a
call passes addresses alone.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterable

import torch
from torch import Tensor

from ..spec import AttentionInputs, AttentionOutputs, AttentionSpec
from . import attention
from .attention import Call
from .library import Array, loaded_library, pointer_to, raise_status

_ADDRESSES = struct.Struct("10Q")  # library.Addresses
_GRADIENT_ADDRESSES = struct.Struct("19Q3q")  # library.GradientAddresses
_NONE = torch.empty(0, device="cpu")
Layout = tuple[tuple[int, ...], tuple[int, ...]]
Layouts = list[tuple[object, ...] | None]


class RepeatedAttention:
    """An implementation, as `operators/operator.py` describes it, of plain calls like the first."""

    def __init__(self, inputs: AttentionInputs, spec: AttentionSpec):
        like = Call(inputs, spec).attention
        B, H, G, T, S, K, V = like.B, like.H, like.G, like.T, like.S, like.K, like.V
        sums = like.N, G, like.F
        self._out, like.out = _lay_out(B, H, T, V)
        self._dquery, like.dquery = _lay_out(B, H, T, K)
        self._dkey, like.dkey = _lay_out(B, G, S, K)
        self._dvalue, like.dvalue = _lay_out(B, G, S, V)
        self.spec, self.dtype = spec, inputs.dtype
        self._inputs = _layouts(inputs)
        self._outputs: Layouts | None = None  # known from the first call on
        self._numerator = (*sums, V) if spec.returns_state else (0,)
        self._denominator = sums if spec.returns_state and spec.normalize else (0,)
        self._denominators = (B, H, T) if spec.normalize else (0,)
        self._run = loaded_library().cumulant_attention_repeat
        self._run_backward = loaded_library().cumulant_attention_repeat_backward
        self._like, self._like_address = like, ctypes.byref(like)

    @staticmethod
    def suits(x: AttentionInputs) -> bool:
        """Whether the kernels read these tensors as they are."""
        return (
            x.key_mask is None
            and x.cu_seqlens is None
            and x.query.dtype == x.key.dtype == x.value.dtype
            and all(0 not in t.shape and t.stride(-1) == 1 for t in (x.query, x.key, x.value))
            and all(t is None or t.is_contiguous() for t in (x.numerator, x.denominator))
        )

    def forward(self, inputs: AttentionInputs, spec: AttentionSpec) -> AttentionOutputs:
        """The outputs, with those that only the backward pass reads.

        Raises:
            GrowingWeights: a log decay is above 0, or NaN.
        """
        outputs = self._forward(inputs, torch.empty(self._denominators, dtype=self.dtype))
        if self._outputs is None:
            self._outputs = _layouts(outputs)
        return outputs

    def forward_only(self, inputs: AttentionInputs, spec: AttentionSpec) -> AttentionOutputs:
        """The same without what only the backward pass reads."""
        return self._forward(inputs, _NONE)

    def _forward(self, x: AttentionInputs, kept: Tensor) -> AttentionOutputs:
        empty, dtype = torch.empty, self.dtype
        S, Z = x.numerator, x.denominator
        out = torch.empty_strided(*self._out, dtype=dtype)
        if S is None or not self.spec.returns_state:
            S1, Z1 = empty(self._numerator, dtype=dtype), empty(self._denominator, dtype=dtype)
        else:  # which takes half as long
            S1 = torch.empty_like(S)
            Z1 = empty(0, dtype=dtype) if Z is None else torch.empty_like(Z)
        outputs = AttentionOutputs(out, kept, S1, Z1)
        status = self._run(self._like_address, _ADDRESSES.pack(*_addresses(x, outputs)))
        if status:
            raise_status("cumulant_attention_repeat", status)
        return outputs

    def backward(
        self,
        upstream: AttentionOutputs,
        inputs: AttentionInputs,
        outputs: AttentionOutputs,
        spec: AttentionSpec,
    ) -> AttentionInputs:
        """The inputs' gradients, from plain tensors that lie in any way."""
        dout, dS, dZ = upstream.out, upstream.final_numerator, upstream.final_denominator
        S, Z, logs = inputs.numerator, inputs.denominator, inputs.log_decay
        if not (
            # hooks of saved tensors may return others than were saved
            _layouts(inputs) == self._inputs
            and _layouts(outputs) == self._outputs
            and all(x is None or (x.dtype == self.dtype and x.is_cpu) for x in upstream)
            and dout.stride(-1) == 1
            and all(x is None or x.is_contiguous() for x in (dS, dZ))
        ):
            return attention.backward(upstream, inputs, outputs, spec)
        dquery, dkey, dvalue = (
            torch.empty_strided(*layout, dtype=inputs.query.dtype, device="cpu")
            for layout in (self._dquery, self._dkey, self._dvalue)
        )
        dS0, dZ0 = (None if x is None else torch.empty_like(x) for x in (S, Z))
        dlogs = None if logs is None else torch.empty(logs.shape, dtype=torch.float64, device="cpu")
        addresses = _GRADIENT_ADDRESSES.pack(
            *_addresses(inputs, outputs),
            dquery.data_ptr(),
            dkey.data_ptr(),
            dvalue.data_ptr(),
            *(pointer_to(x) or 0 for x in (dlogs, dS0, dZ0, dS, dZ)),
            dout.data_ptr(),
            *dout.stride()[:3],
        )
        status = self._run_backward(self._like_address, addresses)
        if status:
            raise_status("cumulant_attention_repeat_backward", status)
        if logs is not None and dlogs is not None:
            dlogs = dlogs.to(logs.dtype)
        return AttentionInputs(
            dquery, dkey, dvalue, numerator=dS0, denominator=dZ0, log_decay=dlogs
        )


def _layouts(tensors: Iterable[Tensor | None]) -> Layouts:
    """All that the kernels rely on, apart from addresses and numbers."""
    return [None if t is None else (t.shape, t.stride(), t.dtype, t.is_cpu) for t in tensors]


def _lay_out(batch: int, heads: int, tokens: int, width: int) -> tuple[Layout, Array]:
    """Shape and strides of `new_heads`, and its array without an address."""
    strides = tokens * heads * width, width, heads * width
    return ((batch, heads, tokens, width), (*strides, 1)), Array(0, *strides)


def _addresses(x: AttentionInputs, y: AttentionOutputs) -> tuple[int, ...]:
    """The fields of `library.Addresses`; 0, no address, is that of an empty tensor too."""
    S, Z, decay = x.numerator, x.denominator, x.log_decay
    return (
        x.query.data_ptr(),
        x.key.data_ptr(),
        x.value.data_ptr(),
        0 if decay is None else decay.data_ptr(),
        0 if S is None else S.data_ptr(),
        0 if Z is None else Z.data_ptr(),
        y.out.data_ptr(),
        y.denominators.data_ptr(),
        y.final_numerator.data_ptr(),
        y.final_denominator.data_ptr(),
    )
