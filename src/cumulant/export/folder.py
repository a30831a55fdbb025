"""A folder with a language model in ONNX: two graphs, their weights, and what a client must know.

`prompt.onnx` reads any number of tokens, and `step.onnx` one. Both take the states of all layers
and return them. `cumulant_onnx.json` names inputs, outputs and states.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from ..models import CumulantForCausalLM
from .graph import OPERATORS, OPSET, GraphBuilder, Weights, import_onnx
from .model import build_graph

DESCRIPTION = "cumulant_onnx.json"
WEIGHTS = "weights.bin"
LETTERS = {
    "B": "rows of the batch, the same number of tokens in each",
    "T": "tokens of this call, at least 1",
    "N": "tokens with logits: the last logits_to_keep of this call, or all if that is 0",
    "S": "tokens of all calls before, 0 at first",
}


def export_onnx(
    model: CumulantForCausalLM,
    output: str | os.PathLike[str],
    tokenizer: Any = None,
    *,
    operators: str = "standard",
) -> None:
    """Write a language model to a new folder as ONNX graphs, with its states as inputs and outputs.

    ``prompt.onnx`` reads T tokens, ``step.onnx`` one. Weights, logits and states are fp32, whatever
    the model's dtype; ELiTA's states are fp64. Both graphs read ``weights.bin``, which holds each
    weight once. The folder appears when it is complete.

    Args:
        model: a causal model with weights of 16 bits or more.
        output: a new or an empty folder.
        tokenizer: transformers' tokenizer, whose files are written too.
        operators: "standard": ONNX's own, of opset 27. "onnxruntime": `LinearAttention` of
            onnxruntime's domain com.microsoft, for which it has a kernel. It walks over the tokens
            where it finds ONNX's operator of that name.

    Raises:
        ModuleNotFoundError: the package onnx is missing.
        ValueError: the folder holds something, or a part of the model, which the message names, has
            no form in ONNX. Nothing is written.
    """
    check_operators(operators)
    target = check_target(output)
    onnx = import_onnx()
    weights = Weights(WEIGHTS)
    graphs: dict[str, Any] = {}
    for name in ("prompt", "step"):
        graphs[name], builder = build_graph(
            model, weights, step=name == "step", operators=operators
        )
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        weights.write(temporary)
        for name, graph in graphs.items():
            onnx.save(graph, temporary / f"{name}.onnx")
            onnx.checker.check_model(temporary / f"{name}.onnx", full_check=True)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        text = json.dumps(describe(model, tokenizer, builder), indent=1, allow_nan=False)
        (temporary / DESCRIPTION).write_text(text + "\n", encoding="utf-8")
        if target.is_dir():
            target.rmdir()
        temporary.replace(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_operators(operators: str) -> None:
    if operators not in OPERATORS:
        raise ValueError(f"operators: expected {' or '.join(OPERATORS)}, got {operators!r}")


def check_target(output: str | os.PathLike[str]) -> Path:
    """The folder to write, which must not hold anything."""
    if not os.fspath(output):
        raise ValueError("output: expected the name of a new folder, got an empty one")
    target = Path(output).expanduser()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"output: {output} holds something; name another folder")
    return target


def describe(model: CumulantForCausalLM, tokenizer: Any, builder: GraphBuilder) -> dict[str, Any]:
    """The contents of ``cumulant_onnx.json``."""
    config = model.config
    special = {
        name: getattr(tokenizer, name, None)
        if getattr(config, name) is None
        else getattr(config, name)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    return {
        "prompt": "prompt.onnx",
        "step": "step.onnx",
        "opset": OPSET,
        "vocab_size": config.vocab_size,
        **special,
        "suppress_tokens": model.generation_config.suppress_tokens or [],
        "letters": LETTERS,
        "inputs": {
            "input_ids": {"dtype": "int64", "shape": ["B", "T"]},
            "logits_to_keep": {"dtype": "int64", "shape": [1], "graphs": ["prompt"]},
        },
        "outputs": {"logits": {"dtype": "float32", "shape": ["B", "N", config.vocab_size]}},
        "states": [
            {
                "input": entry.input,
                "output": entry.output,
                "dtype": entry.dtype,
                "shape": list(entry.shape),
                # JSON has no infinity; float() reads both
                "initial": entry.initial if abs(entry.initial) < float("inf") else "-inf",
            }
            for entry in builder.states
        ],
    }
