"""The compiled kernels: loading them, and the structs of their C interface (`src/abi.hpp`)."""

from __future__ import annotations

import ctypes
import os
import sys
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from ..spec import accumulation_dtype

PATH = Path(__file__).with_name("_kernels.so")
INSTRUCTIONS = ("baseline", "avx2", "avx512", "avx512vnni")  # in the order of `Isa` in src
TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
ABI = 9  # as in src/library.cpp
CHUNK = 64  # the most tokens in a chunk, as scratch matrices have so many rows
ELITA_BLOCK = 16  # tokens between two means that ELiTA saves
MAX_ORDER = 8
GRAIN = 750_000  # multiplications for each further thread
_i64, _i32, _pointer = ctypes.c_int64, ctypes.c_int32, ctypes.c_void_p


class Array(ctypes.Structure):
    """A tensor ``[B, heads, T, D]`` with strides in elements; the last dimension has stride 1."""

    _fields_ = [("data", _pointer), ("batch", _i64), ("head", _i64), ("row", _i64)]


class Attention(ctypes.Structure):
    _fields_ = [
        *((name, _i64) for name in ("B", "N", "H", "G", "T", "S", "K", "V", "F", "chunk", "span")),
        *((name, _i32) for name in ("type", "order", "constant_term", "activation")),
        *((name, _i32) for name in ("normalize", "is_causal", "threads", "isa", "decay_type")),
        ("scale", ctypes.c_double),
        *((name, Array) for name in ("query", "key", "value", "out", "log_decay")),
        *((name, _pointer) for name in ("key_mask", "offsets", "numerator", "denominator")),
        *((name, _pointer) for name in ("final_numerator", "final_denominator", "denominators")),
        *((name, Array) for name in ("dout", "dquery", "dkey", "dvalue")),
        *(
            (name, _pointer)
            for name in ("dfinal_numerator", "dfinal_denominator", "dnumerator", "ddenominator")
        ),
        ("dlog_decay", _pointer),
    ]


class Addresses(ctypes.Structure):
    _fields_ = [
        *((name, _pointer) for name in ("query", "key", "value", "log_decay")),
        *((name, _pointer) for name in ("numerator", "denominator", "out", "denominators")),
        *((name, _pointer) for name in ("final_numerator", "final_denominator")),
    ]


class GradientAddresses(ctypes.Structure):
    _fields_ = [
        ("forward", Addresses),
        *((name, _pointer) for name in ("dquery", "dkey", "dvalue", "dlog_decay")),
        *((name, _pointer) for name in ("dnumerator", "ddenominator")),
        *((name, _pointer) for name in ("dfinal_numerator", "dfinal_denominator")),
        ("dout", Array),
    ]


class Elita(ctypes.Structure):
    _fields_ = [
        *((name, _i64) for name in ("B", "H", "G", "T", "V", "span")),
        *((name, _i32) for name in ("type", "logits", "gates", "threads", "isa")),
        *((name, Array) for name in ("value", "out")),
        *((name, _pointer) for name in ("key_logit", "query_logit", "self_logit", "first")),
        *((name, _pointer) for name in ("key_odds", "own_odds", "means")),
        *((name, _pointer) for name in ("log_weight", "mean", "final_log_weight", "final_mean")),
        *((name, Array) for name in ("dout", "dvalue")),
        *(
            (name, _pointer)
            for name in ("dkey_logit", "dself_logit", "dfinal_log_weight", "dfinal_mean")
        ),
        *((name, _pointer) for name in ("dlog_weight", "dmean")),
    ]


class MixedChunk(ctypes.Structure):
    _fields_ = [
        *((name, _i64) for name in ("B", "N", "H", "G", "T", "K", "L", "V", "size", "span")),
        *(
            (name, _i32)
            for name in ("type", "activation", "is_causal", "summed", "biases", "threads", "isa")
        ),
        *(
            (name, Array)
            for name in ("quad_query", "quad_key", "lin_query", "lin_key", "value", "out")
        ),
        *(
            (name, _pointer)
            for name in ("index", "bounds", "open_quad_key", "open_lin_key", "open_value")
        ),
        *((name, _pointer) for name in ("bias", "bias_transposed", "numerator")),
        *(
            (name, _pointer)
            for name in ("final_numerator", "final_quad_key", "final_lin_key", "final_value")
        ),
        *(
            (name, Array)
            for name in ("dout", "dquad_query", "dquad_key", "dlin_query", "dlin_key", "dvalue")
        ),
        *(
            (name, _pointer)
            for name in ("dfinal_numerator", "dfinal_quad_key", "dfinal_lin_key", "dfinal_value")
        ),
        *(
            (name, _pointer)
            for name in ("dnumerator", "dopen_quad_key", "dopen_lin_key", "dopen_value")
        ),
    ]


class Pointwise(ctypes.Structure):
    _fields_ = [
        *((name, _i32) for name in ("operation", "threads", "isa", "back")),
        *((name, _i64) for name in ("B", "T", "H", "n", "taps")),
        *((name, Array) for name in ("x", "out", "dout", "dx")),
        *(
            (name, _pointer)
            for name in ("second", "weight", "tail", "dsecond", "dweight", "dtail", "factors")
        ),
        *((name, _pointer) for name in ("offset", "cosine", "sine")),
        ("angles", _i64),
        ("epsilon", ctypes.c_double),
    ]


class Instruction(ctypes.Structure):
    _fields_ = [
        *((name, _i32) for name in ("operation", "kind")),
        *((name, _i64) for name in ("source", "second", "third", "fourth")),
        *((name, _i64) for name in ("target", "n", "k")),
        *((name, _pointer) for name in ("weight", "bias", "scales", "amplitudes")),
        ("scalar", ctypes.c_double),
        *((name, _i64) for name in ("state", "add", "bits", "type", "groups", "past", "rotated")),
        ("attention", ctypes.POINTER(Attention)),
        ("mixed", ctypes.POINTER(MixedChunk)),
        ("buckets", _pointer),
    ]


class Past(ctypes.Structure):
    _fields_ = [
        *((name, _i64) for name in ("length", "capacity", "dropped", "new_capacity", "seen")),
        *((name, _pointer) for name in ("first", "lengths")),
    ]


class Program(ctypes.Structure):
    _fields_ = [
        *((name, _i64) for name in ("B", "width", "count", "inputs", "output", "outputs")),
        *((name, _i32) for name in ("threads", "isa")),
        ("type", _i64),
        ("instructions", ctypes.POINTER(Instruction)),
        *((name, _pointer) for name in ("position", "input", "out")),
        *((name, ctypes.POINTER(_pointer)) for name in ("before", "after")),
        ("pasts", ctypes.POINTER(Past)),
        ("separate", _i64),
        *((name, _pointer) for name in ("slots", "wanted")),
        *((name, _i64) for name in ("wanted_count", "tail")),
    ]


class Quantized(ctypes.Structure):
    _fields_ = [
        *((name, _i64) for name in ("n", "k")),
        *((name, _i32) for name in ("bits", "threads", "isa")),
        *((name, _pointer) for name in ("codes", "scales", "out")),
    ]


class QuantizedProduct(ctypes.Structure):
    _fields_ = [
        *((name, _i64) for name in ("T", "n", "k")),
        *((name, _i32) for name in ("bits", "threads", "isa")),
        *((name, _pointer) for name in ("codes", "scales", "bias", "x", "out")),
    ]


def require(condition: bool, name: str, wanted: object, got: object) -> None:
    """Raise an error unless `condition` holds; the operations have checked users' arguments."""
    if not condition:
        raise ValueError(f"{name}: expected {wanted}, got {got}")


def check_inputs(**inputs: tuple[Tensor, tuple[int, ...]]) -> None:
    """Check that tensors are on the CPU, and have known dtypes and these shapes.

    The C++ counts a token's numbers in 32 bits, so these must be fewer than 2**31.
    """
    for name, (x, shape) in inputs.items():
        numbers = shape[1] * shape[3] if len(shape) == 4 else 0
        if x.dtype in TYPES and x.device.type == "cpu" and x.shape == shape and numbers < 2**31:
            continue  # forming the messages below takes time
        require(x.dtype in TYPES, name, "fp16, bf16, fp32 or fp64", x.dtype)
        require(x.device.type == "cpu", name, "a tensor on the CPU", x.device)
        require(x.shape == shape, name, list(shape), list(x.shape))
        require(numbers < 2**31, name, "fewer than 2**31 numbers a token", list(shape))


def materialized(x: Tensor) -> Tensor:
    """The same numbers as memory: copies negated views, and zero tensors without memory."""
    return x.clone() if x.is_neg() or x._is_zerotensor() else x


class Arguments:
    """Converts tensors to the dtype and layout that the C++ reads, and keeps them alive."""

    def __init__(self, dtype: torch.dtype):
        self.dtype, self.sums_dtype = dtype, accumulation_dtype(dtype)
        self._tensors: list[Tensor] = []

    def array_of(self, x: Tensor, dtype: torch.dtype | None = None) -> Array:
        """The tensor in `dtype`, by default that of the call, with rows of stride 1."""
        x = materialized(x)
        if x.dtype != (dtype or self.dtype):
            x = x.to(dtype or self.dtype)
        if x.stride(-1) != 1:
            x = x.contiguous()
        self._tensors.append(x)
        return array_of(x)

    def pointer_to(self, x: Tensor | None, dtype: torch.dtype) -> int | None:
        """The address of the tensor in `dtype`, contiguous; None for None."""
        if x is None:
            return None
        x = materialized(x).to(dtype).contiguous()
        self._tensors.append(x)
        return pointer_to(x)


def array_of(x: Tensor) -> Array:
    """The address and strides of ``x [B, heads, T, D]``."""
    batch, head, row, _ = x.stride()
    return Array(x.data_ptr(), batch, head, row)


def pointer_to(x: Tensor | None) -> int | None:
    """The address of a tensor's numbers; None for None."""
    return None if x is None else x.data_ptr()


STRUCTURES = (
    *(Array, Attention, Addresses, GradientAddresses, Elita, MixedChunk, Pointwise),
    *(Instruction, Past, Program, Quantized, QuantizedProduct),
)


def expected_layout() -> str:
    """The offsets of all structs' fields, a line each, as `cumulant_layout` writes them."""
    lines = []
    for structure in STRUCTURES:
        names = [field[0] for field in structure._fields_]
        offsets = [f"{name}:{getattr(structure, name).offset}" for name in names]
        lines.append(" ".join([structure.__name__, *offsets, f"size:{ctypes.sizeof(structure)}\n"]))
    return "".join(lines)


def _compiled_layout(library: ctypes.CDLL) -> str:
    library.cumulant_layout.restype = ctypes.c_char_p
    return bytes(library.cumulant_layout()).decode()


@lru_cache(maxsize=1)
def _load_library() -> tuple[ctypes.CDLL | None, str]:
    """The library, or the reason why there is none."""
    if sys.platform == "win32":
        return None, "its kernels are not built on Windows"
    if not PATH.exists():
        return (
            None,
            (
                "its kernels were not compiled: no C++ compiler (GCC, Clang) when cumulant was"
                " installed"
            ),
        )
    try:
        library = ctypes.CDLL(os.fspath(PATH))
    except OSError as error:
        return None, f"its kernels cannot be loaded: {error}"
    if library.cumulant_abi() != ABI or _compiled_layout(library) != expected_layout():
        return None, "its kernels were compiled from another version of cumulant: install it again"
    entry = _openmp_entry()
    if entry is not None:
        library.cumulant_use_openmp.argtypes = [_pointer]
        library.cumulant_use_openmp(entry)
    return library, ""


def _openmp_entry() -> int | None:
    """The function of torch's own OpenMP runtime that starts threads, if it has GNU's interface."""
    path = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        loaded = ctypes.CDLL(os.fspath(path), mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
        return ctypes.cast(loaded.GOMP_parallel, _pointer).value
    except (OSError, AttributeError):
        return None


def obstacle(x: Tensor) -> str:
    """Why these kernels cannot take tensors such as `x`; empty if they can."""
    if x.device.type != "cpu":
        return f"its kernels are for the CPU, and the inputs are on {x.device}"
    return missing_reason()


def missing_reason() -> str:
    """Why the native kernels cannot run here; empty if they can."""
    return _load_library()[1]


# This is what torch.compiler.assume_constant_result does; calling it would import all of
# torch.compile with this file.
missing_reason._dynamo_marked_constant = True  # type: ignore[attr-defined]


@lru_cache(maxsize=1)
def instruction_set_name() -> str:
    """The instruction set of the kernels: CUMULANT_ISA, or the widest of this machine."""
    library = loaded_library()
    supported = [name for i, name in enumerate(INSTRUCTIONS) if library.cumulant_supports(i)]
    wanted = os.environ.get("CUMULANT_ISA") or supported[-1]
    if wanted not in supported:
        raise ValueError(
            f"CUMULANT_ISA: expected one of {', '.join(supported)} on this machine, got {wanted!r}"
        )
    return wanted


def instruction_set_number() -> int:
    """The number of the instruction set in the C++ library."""
    return INSTRUCTIONS.index(instruction_set_name())


def thread_count(multiplications: int) -> int:
    """The number of torch's threads that pays off for so many multiplications."""
    return max(1, min(torch.get_num_threads(), multiplications // GRAIN))


def loaded_library() -> ctypes.CDLL:
    """The library, or an error with the reason why there is none."""
    library, reason = _load_library()
    if library is None:
        raise RuntimeError(f"impl 'native': {reason}")
    return library


def multiply_rate(threads: int, dtype: torch.dtype = torch.float32) -> float:
    """Multiplications and additions a second that `threads` threads reach, measured now."""
    rate = loaded_library().cumulant_multiply_rate
    rate.restype = ctypes.c_double
    return float(rate(TYPES[dtype], instruction_set_number(), threads))


def call_library(function: str, arguments: ctypes.Structure, *more: int | None) -> None:
    """Call a function of the library, and raise its errors. more: addresses after the arguments."""
    status = getattr(loaded_library(), function)(ctypes.byref(arguments), *map(_pointer, more))
    if status:
        raise_status(function, status)


class GrowingWeights(ValueError):
    """A log decay is above 0, or NaN."""


def raise_status(function: str, status: int) -> None:
    """Raise the error that a function of the library returned."""
    if status == 1:
        raise MemoryError("impl 'native': not enough memory for the sums of its threads")
    if status == 3:
        raise GrowingWeights("log_decay: expected numbers of at most 0, got a larger one or NaN")
    if status == 4:
        raise ValueError(
            "logits: expected numbers below +inf, got NaN or infinity; an earlier layer may have"
            " overflowed"
        )
    raise RuntimeError(f"impl 'native': {function} failed with status {status}")
