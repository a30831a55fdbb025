"""`cumulant quantize`: a trained model's folder with weights of 8 or 4 bits."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from ..models.quantization import quantize
from .checkpoint import checkpoint_folder, load_checkpoint
from .evaluate import evaluate_windowed
from .tokens import TokenFile, first_tokens, read_tokens

EVALUATED = 200_000  # tokens of the held-out text, at most


@dataclass(frozen=True)
class Size:
    """A model's weights on the disk, and its held-out loss if it was measured."""

    bits: int
    weight_bytes: int
    bits_per_byte: float | None


def quantize_checkpoint(
    path: str, bits: int, output: str, *, evaluate: bool = True, device: str = "auto"
) -> tuple[Size, Size]:
    """Write the quantised model and its tokenizer to the new folder `output`.

    The folder appears when it is complete. evaluate: measure the loss of both models on the first
    200,000 tokens of the run's held-out text, if the run keeps one, in windows of 1,024.

    Raises:
        ValueError: no model at `path`, one that is quantised, or a folder that holds something.
    """
    target = Path(output).expanduser()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"output: {output} holds something; name another folder")
    folder = checkpoint_folder(path)
    model, tokenizer = load_checkpoint(path, device)
    text = _heldout_text(tokenizer, Path(path).expanduser(), folder) if evaluate else None

    def loss() -> float | None:
        return None if text is None else evaluate_windowed(model, text, 1024).bits_per_byte

    before = Size(8 * model.dtype.itemsize, _weight_bytes(folder), loss())
    quantize(model, bits, original=str(path))
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        if target.is_dir():
            target.rmdir()
        temporary.replace(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return before, Size(bits, _weight_bytes(target), loss())


def _weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _heldout_text(tokenizer: PreTrainedTokenizerFast, *folders: Path) -> TokenFile | None:
    """The first held-out tokens of a run, if it keeps them."""
    for folder in folders:
        if (folder / "tokens" / "tokens.json").is_file():
            return first_tokens(read_tokens(folder / "tokens")[1], EVALUATED, tokenizer)
    return None
