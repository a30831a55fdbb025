"""Where Triton's kernels run, and how they are launched."""

from __future__ import annotations

import os
from functools import lru_cache
from importlib import metadata
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ..guarded import KernelFailure

OLDEST = (3, 6)
CAPABILITY = (8, 0)
WAVES = 2  # programs for each multiprocessor
PROCESSORS = 1  # of a CPU in Triton's interpreter

# How kernels are compiled. A multiplication and an addition may be one instruction: for that,
# Triton's default differs between versions.
COMPILED = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}

# What the driver says of faults that came before a launch, or have nothing to do with it
EARLIER = ("illegal memory access", "out of memory", "device-side assert", "captur")

# Arguments that follow from lengths. Kernels are not compiled again for their values.
VARYING = ["T", "span", "splits", "blocks", "size", "sizes", "most", "groups"]
VARYING += [f"{x}_{y}" for x in "cdrs" for y in ("batch", "head")]


# Whether kernels run in Triton's interpreter, on the CPU; Triton reads it once too.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
FLUSHES = not INTERPRETED and not torch.version.hip  # NVIDIA's instruction for exponentials
_found: list[str] = []


def missing_reason() -> str:
    """Why Triton cannot be used; empty if it can."""
    if not _found:
        _found.append(_find_triton())
    return _found[0]


# This is what torch.compiler.assume_constant_result does; calling it would import all of
# torch.compile with this file.
missing_reason._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _find_triton() -> str:
    if find_spec("triton") is None:
        return "Triton is not installed"
    found = triton_version()
    if tuple(int(x) for x in found.split(".")[:2]) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        return f"its kernels need Triton {oldest} or newer, and this is {found}"
    return ""


def triton_version() -> str:
    """Triton's version, without importing it where its package has a usual name."""
    for name in ("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-rocm"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    import triton

    return str(triton.__version__)


def obstacle(x: Tensor) -> str:
    """Why the kernels cannot take tensors such as `x`; empty where they can."""
    if x.device.type == "cuda":
        if x.dtype == torch.float64:
            return "its kernels take no fp64 on a GPU"
        if _is_old(x.device.index or 0):
            return "its kernels need a GPU of compute capability 8.0 or newer"
    elif not (x.device.type == "cpu" and INTERPRETED):
        return f"its kernels run on GPUs, and the tensors are on {x.device.type!r}"
    return missing_reason()


def _is_old(index: int) -> bool:
    return not torch.version.hip and torch.cuda.get_device_capability(index) < CAPABILITY


_is_old._dynamo_marked_constant = True  # type: ignore[attr-defined]


def generation(x: Tensor) -> int:
    """The first number of an NVIDIA GPU's compute capability; 0 for other devices."""
    if x.device.type != "cuda" or torch.version.hip:
        return 0
    return _generation(x.device.index or 0)


def _generation(index: int) -> int:
    return torch.cuda.get_device_capability(index)[0]


_generation._dynamo_marked_constant = True  # type: ignore[attr-defined]


def slower(x: Tensor) -> str:
    """Why "auto" takes another implementation."""
    return "" if x.device.type == "cuda" else "it runs in Triton's interpreter here"


def wanted_programs(x: Tensor) -> int:
    """How many programs keep the device of `x` busy."""
    return WAVES * (_processors(x.device) if x.device.type == "cuda" else PROCESSORS)


@lru_cache(maxsize=64)
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def dot_type(*tensors: Tensor, hip: bool = bool(torch.version.hip)) -> str:
    """How products of these tensors are taken.

    Features of fp16 numbers may be beyond fp16, and tf32 has the same digits. fp32 numbers take
    three products, and keep nearly all of theirs.
    """
    dtypes = {x.dtype for x in tensors}
    if torch.float64 in dtypes:
        return "ieee"
    if torch.float32 in dtypes:
        return "bf16x3" if hip else "tf32x3"
    return "tf32" if torch.float16 in dtypes else "bf16"


_TYPES = {
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float32: "float32",
    torch.float64: "float64",
}


def constants(*values: Any) -> list[Any]:
    """Values as kernels take them in a tuple of constants."""
    import triton.language as tl

    return [
        tl.constexpr(getattr(tl, _TYPES[x]) if isinstance(x, torch.dtype) else x) for x in values
    ]


def with_rows(x: Tensor) -> Tensor:
    """x, copied if the numbers of a vector are not side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def power_of_two(n: int, most: int = 64) -> int:
    """The power of two that holds n, from 16 to `most`."""
    return min(max(16, 1 << (n - 1).bit_length()), most)


def launch(kernel: Any, programs: int, like: Tensor, *arguments: Any, **options: Any) -> None:
    """Run a kernel on the device of `like`."""
    try:
        if like.device.type == "cuda":
            with torch.cuda.device(like.device):
                kernel[(programs,)](*arguments, **options, **COMPILED)
        else:
            import numpy

            with numpy.errstate(all="ignore"):
                kernel[(programs,)](*arguments, **options)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of Triton, its compilers, or the driver
        if any(words in str(error) for words in EARLIER):
            raise
        first = (str(error).strip().splitlines() or [""])[0][:200]
        raise KernelFailure(
            f"the kernel {getattr(kernel, '__name__', kernel)} could not be compiled or started"
            f" ({type(error).__name__}: {first})"
        ) from error
