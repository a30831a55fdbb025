"""Loading a trained model with its tokenizer, refusing what does not fit."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from transformers import PreTrainedTokenizerFast

from ..models import CumulantConfig, CumulantForCausalLM
from .options import choose_device
from .runs import whole_checkpoints
from .tokenizer import load_tokenizer


def load_checkpoint(path: str, device: str = "auto") -> tuple[CumulantForCausalLM, PreTrainedTokenizerFast]:
    """Model (in evaluation mode) and tokenizer from a run's folder or one of its checkpoints.

    Raises:
        ValueError: no checkpoint there, weights of another shape, or a tokenizer of another size.
    """
    device = choose_device(device)
    folder = checkpoint_folder(path)
    model = load_weights(folder)
    tokenizer = load_tokenizer(folder)
    if len(tokenizer) != model.config.vocab_size:
        raise ValueError(
            f"tokenizer: {folder} holds a tokenizer of {len(tokenizer)} tokens, but the model has "
            f"{model.config.vocab_size}; use the tokenizer it was trained with"
        )
    return model.to(device).eval(), tokenizer


def checkpoint_folder(path: str) -> Path:
    """The folder that holds the model of a run: its own, or that of its last whole checkpoint."""
    folder = Path(path)
    if folder.is_file():
        raise ValueError(
            f"checkpoint: {path} is a file; expected the folder of a trained model (a text goes to --data)"
        )
    if (folder / "config.json").is_file():
        return folder
    whole = whole_checkpoints(folder) if folder.is_dir() else []
    if not whole:
        raise ValueError(f"checkpoint: no model at {path}; train one with: cumulant train --output {path}")
    return whole[-1]


def load_weights(
    folder: Path, config: CumulantConfig | None = None, *, new: tuple[str, ...] = ()
) -> CumulantForCausalLM:
    """The model in `folder`, under its own configuration or another; only weights whose names begin with one of `new`
    may be missing there: they keep their initial values."""
    model: CumulantForCausalLM
    try:
        model, info = CumulantForCausalLM.from_pretrained(
            folder, config=config, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except (RuntimeError, OSError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"checkpoint: the weights in {folder} do not fit its config.json: {reason}") from error
    missing = [name for name in info["missing_keys"] if not name.startswith(new)] if new else info["missing_keys"]
    wrong = [*missing, *(entry[0] for entry in info["mismatched_keys"]), *info["unexpected_keys"]]
    if wrong:
        what = "its config.json" if config is None else "this run's options"
        raise ValueError(f"checkpoint: the weights in {folder} do not fit {what}: {wrong[0]}")
    return model
