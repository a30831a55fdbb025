"""The Triton kernels as `gpu_offline.py` compiles them: calls, constants, types of arguments."""

from __future__ import annotations

import inspect
import re
from typing import Any, NamedTuple

import torch

TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


class Family(NamedTuple):
    """The kernels of an operation.

    half: arguments in the inputs' dtype. wide: in fp64. integers, longs: in int32 and int64.
    constants: of kernels that have them.
    """

    kernels: tuple[str, ...]
    half: str
    wide: str
    integers: str
    longs: str
    constants: dict[str, Any]


ATTENTION = Family(
    ("key_sums", "outputs", "query_sums", "query_gradients", "key_gradients", "scan_spans",
     "scan_moments", "step"),
    "query key value dquery dkey dvalue",
    "totals",
    "rows begins offsets first_spans",
    "",
    {"SOURCE": "spans", "FINAL": False, "HAS_BEFORE": False, "HAS_AFTER": False,
     "BACKWARDS": False, "GROUP": 1},
)  # fmt: skip
ELITA = Family(
    ("span_means", "scan_means", "mean_outputs", "mean_step", "mean_gradient_sums",
     "scan_mean_gradients", "mean_gradients", "finish_logits"),
    "value out dout dvalue",
    "log_weights means saved_log_weights saved_means before_log_weight before_mean last_log_weight"
    " last_mean sums passes after dlog_weights dmean dlog_weight last dlog_weight_after",
    "open_spans",
    "",
    {"HAS_BEFORE": True, "SAVE": True, "LAST": False, "HAS_LAST": False, "HAS_AFTER": True,
     "HAS_LOG": False, "BEFORE": False},
)  # fmt: skip
MIXED = Family(
    ("group_sums", "scan_groups", "mixed_outputs", "open_group", "mixed_query_gradients",
     "mixed_key_gradients", "mixed_value_gradients", "bias_gradients"),
    "key value quad_query quad_key lin_query lin_key x bias dout out dquad_query dlin_query"
    " dquad_key dlin_key dvalue",
    "",
    "",
    "index rows numbers bases fills firsts",
    {"QUERIES": False, "HAS_BEFORE": False, "KEEP": True, "BACKWARDS": False, "BLOCK": 1024,
     "D": 128, "BD": 64, "PARTS": 2, "AFTER": False},
)  # fmt: skip
FAMILIES = {"elita": ELITA, "mixed": MIXED}


def calls() -> dict[str, dict[str, Any]]:
    """The calls whose kernels are compiled, by name."""
    base: dict[str, Any] = {"K": 16, "V": 64, "order": 2, "activation": "identity"}
    base |= {"dtype": torch.bfloat16, "decays": False}
    elu = base | {"K": 64, "order": 0, "activation": "elu"}
    fp32: dict[str, Any] = {"dtype": torch.float32}
    mixed = base | {"K": 128, "V": 256, "group": 256, "activation": "relu2"}
    return {
        "taylor-2 K16 V64 bf16": base,
        "elu K64 V64 bf16": elu,
        "taylor-2 K16 V64 bf16 decay": base | {"decays": True},
        "elu K64 V64 bf16 decay": elu | {"decays": True},
        "taylor-2 K16 V64 fp32": base | fp32,
        "elu K64 V64 fp32": elu | fp32,
        "taylor-2 K16 V64 fp16": base | {"dtype": torch.float16},
        "taylor-2 K8 V64 bf16": base | {"K": 8},
        "taylor-2 K32 V64 bf16": base | {"K": 32},
        "taylor-1 K16 V64 bf16": base | {"order": 1},
        "elu K128 V128 bf16": elu | {"K": 128, "V": 128},
        "elu K256 V256 bf16": elu | {"K": 256, "V": 256},
        "elita V64 bf16": base,
        "elita V64 bf16 packed": base | {"packed": True},
        "elita V128 bf16": base | {"V": 128},
        "elita V64 fp32": base | fp32,
        "mixed g256 K128 bf16": mixed,
        "mixed g256 K128 bf16 laplace": mixed | {"activation": "laplace", "bias": True},
        "mixed g256 K128 bf16 masked": mixed | {"masked": True},
        "mixed g256 K128 fp32": mixed | fp32,
    }


def family_of(label: str) -> Family:
    return FAMILIES.get(label.split(maxsplit=1)[0], ATTENTION)


def kernels_of(label: str) -> tuple[str, ...]:
    """The names of a call's kernels."""
    names = family_of(label).kernels
    return tuple(name for name in names if name != "scan_moments" or calls()[label]["order"] == 2)


def make_form(label: str, target: int | str) -> Any:
    """The constants of a call, as the calls themselves make them."""
    from cumulant.kernels.triton import device

    call, hip = calls()[label], isinstance(target, str)
    if label.startswith("elita"):
        from cumulant.kernels.triton.mean_form import MeanForm

        return MeanForm(*device.constants(*_mean_form(call, hip).values()))
    if label.startswith("mixed"):
        from cumulant.kernels.triton.mixed_form import MixedForm

        return MixedForm(*device.constants(*_mixed_form(call, hip).values()))
    from cumulant.kernels.triton.form import Form

    return Form(*device.constants(*_attention_form(call, target)))


def _attention_form(call: dict[str, Any], target: int | str) -> Any:
    from cumulant.kernels.spec import AttentionSpec
    from cumulant.kernels.triton import device
    from cumulant.kernels.triton.attention import chunk_on
    from cumulant.kernels.triton.call import form_constants

    order, hip = call["order"], isinstance(target, str)
    chunk = chunk_on(0 if isinstance(target, str) else target // 10, order)
    scale = call["K"] ** -0.5 if order else 1.0
    spec = AttentionSpec(order, True, call["activation"], scale, True, True, False, chunk)
    dot = device.dot_type(torch.empty(0, dtype=call["dtype"]), hip=hip)
    found = form_constants(call["K"], call["V"], spec, dot, torch.float32)
    return found._replace(decays=call["decays"], flushes=not hip)


def _mean_form(call: dict[str, Any], hip: bool) -> dict[str, Any]:
    from cumulant.kernels.spec import ElitaInputs
    from cumulant.kernels.triton.elita import CHUNK, mean_form

    logits, value = torch.empty(1, 1, 4), torch.empty(1, 1, 4, call["V"], dtype=call["dtype"])
    first = torch.empty(4) if call.get("packed") else None
    return mean_form(ElitaInputs(logits, logits, logits, value, first), CHUNK, hip)


def _mixed_form(call: dict[str, Any], hip: bool) -> dict[str, Any]:
    from cumulant.kernels.spec import MixedChunkInputs, MixedChunkSpec
    from cumulant.kernels.triton.mixed_chunk import mixed_form

    x, v = (torch.empty(1, 1, 4, n, dtype=call["dtype"]) for n in (call["K"], call["V"]))
    bias = torch.empty(1, 4, 4) if call.get("bias") else None
    mask = torch.empty(1, 4) if call.get("masked") else None
    position = torch.empty(1) if call.get("masked") else None
    inputs = MixedChunkInputs(x, x, x, x, v, bias, mask, position=position)
    spec = MixedChunkSpec(call["group"], call["activation"], True, True, 0.0, True)
    return mixed_form(inputs, spec, hip)


def constants_of(label: str, names: list[str], target: int | str) -> dict[str, Any]:
    """The constants of a kernel with these arguments."""
    call, family = calls()[label], family_of(label)
    found = family.constants | {"SHARES": call["decays"]}
    if family is ATTENTION:
        found |= {"V": call["V"], "BV": 64, "BLOCKS": -(-call["V"] // 64)}
    return {"form": make_form(label, target)} | {k: v for k, v in found.items() if k in names}


def signature(kernel: Any, label: str) -> tuple[dict[str, str], list[str]]:
    """The types of a kernel's arguments, and those that are multiples of 16."""
    family, dtype = family_of(label), TYPES[calls()[label]["dtype"]]
    kinds = dict.fromkeys(family.half.split(), dtype) | dict.fromkeys(family.wide.split(), "fp64")
    kinds |= dict.fromkeys(family.integers.split(), "i32")
    kinds |= dict.fromkeys(family.longs.split(), "i64")
    kinds |= {"mask": "u8", "first": "u8"}
    numbers = {"T", "span", "splits", "blocks", "H", "G", "parts", "most", "groups"}
    numbers |= {"size", "sizes"}
    types, aligned = {}, []
    for name, parameter in inspect.signature(kernel.fn).parameters.items():
        if "constexpr" in str(parameter.annotation):
            types[name] = "constexpr"
        elif name in numbers or re.fullmatch(r"\w_(batch|head|row)", name):
            types[name] = "i64" if name.startswith("size") else "i32"
            if re.fullmatch(r"[qkvgoxy]_(batch|head|row)|sizes?", name):
                aligned.append(name)
        else:
            types[name] = f"*{kinds.get(name, 'fp32')}"
            aligned.append(name)
    return types, aligned
