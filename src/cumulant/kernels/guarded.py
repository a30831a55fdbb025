"""Triton's kernels where "auto" takes them: tried on a few tokens first, and replaced if they fail.

They are compiled at first use, for a GPU and by a compiler that their tests may not have seen. So
before the first call of each kind they run on a few random tokens, forwards and backwards, and are
compared with PyTorch's operators. After a failure these run instead, with one warning.
"""

from __future__ import annotations

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


def _random_like(inputs: Any) -> Any:
    """Random values, decays below 0, and positive queries and keys, lest denominators vanish."""
    make, found = torch.Generator().manual_seed(0), {}
    for name, x in inputs._asdict().items():
        if x is not None:
            y = torch.randn(x.shape, generator=make)
            y = y if name == "value" else -y.abs() if name == "log_decay" else y.abs()
            found[name] = y.to(x.device, x.dtype)
    return inputs._replace(**found)


class Guarded:
    """The kernels of one operation, with PyTorch's operators behind them."""

    def __init__(self, operation: str, kernels: Any, pytorch: Any):
        self.operation, self.kernels, self.pytorch = operation, kernels, pytorch
        self._tried: set[Any] = set()

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
        return self.pytorch.forward(inputs, self.pytorch.prepared(inputs, spec))

    def _try_once(self, inputs: Any, spec: Any) -> None:
        few = inputs.first_tokens(TOKENS)
        kind = spec, tuple(None if x is None else (x.dtype, x.shape[1], x.shape[-1]) for x in few)
        if kind in self._tried or few[0].numel() == 0:
            return
        self._tried.add(kind)
        few = _random_like(few)
        found = self._results(self.kernels, few, spec)
        expected = self._results(self.pytorch, few, self.pytorch.prepared(few, spec))
        for a, b in zip(found, expected, strict=True):
            error, size = (a.double() - b.double()).norm(), b.double().norm()
            if not bool(error <= BOUNDS[few.value.dtype] * size):
                self._give_up(f"their results differ from PyTorch's by {float(error / size):.1e}")
                return

    def _results(self, module: Any, inputs: Any, spec: Any) -> list[Tensor]:
        """The output, and the gradients of tokens where the output is its own gradient."""
        y = module.forward(inputs, spec)
        upstream = y._replace(**dict.fromkeys(y._fields))._replace(out=y.out)
        gradients = module.backward(upstream, inputs, y, spec)
        return [y.out, *(x for x in gradients if x is not None)]

    def _give_up(self, cause: str) -> None:
        failures[self.operation] = cause
        warnings.warn(
            f"the Triton kernels of {self.operation} attention are not used any more in this"
            f" process: {cause}. PyTorch's operators run instead. Please report this with the"
            " output of `cumulant info`; impl='triton' gives the whole error.",
            RuntimeWarning,
            stacklevel=2,
        )
