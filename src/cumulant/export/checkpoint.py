"""`cumulant export`: a trained run in the format of another program."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from ..models import CumulantForCausalLM
from ..text.checkpoint import load_checkpoint
from .folder import WEIGHTS, check_operators, check_target, export_onnx
from .graph import import_onnx
from .runtime import OnnxModel

FORMATS = ("onnx",)
PROMPT, STEPS = 64, 16  # tokens that both read to be compared


@dataclass(frozen=True)
class Exported:
    """What an export wrote.

    weight_bytes: of the weights' file. difference: the largest difference of onnxruntime's logits
    from PyTorch's on random tokens; None where onnxruntime is not installed.
    """

    weight_bytes: int
    difference: float | None


def export_checkpoint(
    path: str, output: str, *, format: str = "onnx", operators: str = "standard"
) -> Exported:
    """Write the model and the tokenizer of a run to the new folder `output`; see `export_onnx`.

    Raises:
        ModuleNotFoundError: a package is missing.
        ValueError: an unknown format, no model at `path`, a folder that holds something, or a part
            of the model that cannot be exported.
    """
    if format not in FORMATS:
        raise ValueError(f"format: expected {' or '.join(FORMATS)}, got {format!r}")
    check_operators(operators)
    target = check_target(output)
    import_onnx()
    model, tokenizer = load_checkpoint(path, "cpu")
    export_onnx(model, target, tokenizer, operators=operators)
    return Exported((target / WEIGHTS).stat().st_size, largest_difference(model, target))


@torch.no_grad()
def largest_difference(model: CumulantForCausalLM, folder: str | os.PathLike[str]) -> float | None:
    """The largest difference of the exported model's logits from the model's in fp32.

    Both read the same random ids, a prompt and then single tokens. None without onnxruntime.
    """
    if find_spec("onnxruntime") is None:
        return None
    exact, run = model.float().eval(), OnnxModel(Path(folder))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, PROMPT + STEPS), generator=generator)
    expected = exact(ids).logits[0]
    found = [run.read(ids[:, :PROMPT].numpy(), logits_to_keep=0)[0]]
    found += [run.read(ids[:, t : t + 1].numpy())[0] for t in range(PROMPT, PROMPT + STEPS)]
    return float((torch.cat([torch.from_numpy(x) for x in found]) - expected).abs().max())
