"""Triton's kernels where "auto" takes them: tried on a few tokens first, and replaced if they fail.

They are compiled at first use, for a GPU and by a compiler that their tests may not have seen. So
before the first call of each kind they run on a few random tokens, forwards and backwards, and are
compared with PyTorch's operators. After a failure these run instead, with one warning.
"""

from __future__ import annotations

import threading
import warnings
from typing import Any

import torch
from torch import Tensor

TOKENS = 200  # several chunks, and no whole number of them
# Bounds on ||found - expected|| / ||expected||: ten times what half precision's products lose
BOUNDS = {torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 1e-2, torch.float64: 1e-9}

# Why the kernels of an operation are not used any more in this process
failures: dict[str, str] = {}


class KernelFailure(RuntimeError):
    """A kernel that could not be compiled or started."""


def _random_tokens(like: Any, count: int) -> Any:
    """Random values, decays below 0, and positive queries and keys, lest denominators vanish."""
    make, found = torch.Generator(device="cpu").manual_seed(0), {}
    for name, x in like._asdict().items():
        if x is None:
            continue
        shape = x.shape if name == "bias" else (*x.shape[:2], count, *x.shape[3:])
        y = torch.randn(shape, generator=make, device="cpu", dtype=torch.float32)
        if name not in ("value", "bias"):
            y = y.abs() * (x.shape[-1] ** -0.5 if x.dim() == 4 else 1.0)
        found[name] = (-y if name == "log_decay" else y).to(x.device, x.dtype)
    return like._replace(**found)


def _capturing(x: Tensor) -> bool:
    """Whether a CUDA graph is being captured, in which nothing may be compared."""
    return x.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class Guarded:
    """The kernels of one operation, with PyTorch's operators behind them."""

    def __init__(self, operation: str, kernels: Any, pytorch: Any):
        self.operation, self.kernels, self.pytorch = operation, kernels, pytorch
        self._tried: set[Any] = set()
        self._lock = threading.RLock()

    def forward(self, inputs: Any, spec: Any) -> Any:
        """The outputs, with what the backward pass reads."""
        return self._run("forward", inputs, spec)

    def forward_only(self, inputs: Any, spec: Any) -> Any:
        """The outputs of a call without gradients."""
        return self._run("forward_only", inputs, spec)

    def backward(self, upstream: Any, inputs: Any, outputs: Any, spec: Any) -> Any:
        """The inputs' gradients."""
        if self.operation not in failures:
            try:
                return self.kernels.backward(upstream, inputs, outputs, spec)
            except KernelFailure as failure:
                self._give_up(str(failure))
        spec = self.pytorch.prepared(inputs, spec)
        return self.pytorch.backward(upstream, inputs, outputs, spec)

    def _run(self, name: str, inputs: Any, spec: Any) -> Any:
        if self.operation not in failures:
            try:
                self._try_once(inputs, spec)
                if self.operation not in failures:
                    return getattr(self.kernels, name, self.kernels.forward)(inputs, spec)
            except KernelFailure as failure:
                self._give_up(str(failure))
        y = self.pytorch.forward(inputs, self.pytorch.prepared(inputs, spec))
        if name != "forward":
            return y
        # what PyTorch's backward pass does not read has the shape that `torch.compile` was told
        told = spec.new_outputs(
            type(inputs)(*(None if x is None else x.to("meta") for x in inputs))
        )
        return type(y)(
            *(
                a if a.shape == b.shape else a.new_zeros(b.shape)
                for a, b in zip(y, told, strict=True)
            )
        )

    def _try_once(self, inputs: Any, spec: Any) -> None:
        sizes = tuple(
            (x.dtype, x.shape[1], x.shape[-1] if x.dim() == 4 else 0)
            for x in inputs
            if x is not None and x.dim() > 2
        )
        kind = spec, inputs.value.device, sizes
        if kind in self._tried or inputs[0].numel() == 0 or _capturing(inputs.value):
            return
        # short spans and several groups, so that all kernels run
        count = max(TOKENS, 5 * getattr(spec, "group_size", 0) // 2)
        short = spec._replace(span=spec.chunk) if getattr(spec, "chunk", 0) else spec
        few = _random_tokens(inputs.one_token(), count)
        with self._lock:
            if kind in self._tried or self.operation in failures:
                return
            expected, upstream = self._results(self.pytorch, few, self.pytorch.prepared(few, spec))
            found, _ = self._results(self.kernels, few, short, upstream)
            for a, b in zip(found, expected, strict=True):
                error, size = (a.double() - b.double()).norm(), b.double().norm()
                # sums in fp16 may be beyond its range, which shows nothing
                if bool(size.isfinite()) and not bool(error <= BOUNDS[few.value.dtype] * size):
                    self._give_up(
                        f"their results differ from PyTorch's by {float(error / size):.1e}"
                    )
                    return
            self._tried.add(kind)

    def _results(
        self, module: Any, inputs: Any, spec: Any, upstream: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor]:
        """The output and gradients, and the gradient of the output that they are of."""
        y = module.forward(inputs, spec)
        if upstream is None:
            upstream = y.out / y.out.double().norm().clamp(min=1e-3).to(y.out.dtype)
        given = y._replace(**dict.fromkeys(y._fields))._replace(out=upstream)
        gradients = module.backward(given, inputs, y, spec)
        return [y.out, *(x for x in gradients if x is not None)], upstream

    def _give_up(self, cause: str) -> None:
        with self._lock:
            if self.operation in failures:
                return
            failures[self.operation] = cause
        warnings.warn(
            f"the Triton kernels of {self.operation} attention are not used any more in this"
            f" process: {cause}. PyTorch's operators run instead. Please report this with the"
            " output of `cumulant info`; impl='triton' gives the whole error.",
            RuntimeWarning,
            stacklevel=2,
        )
