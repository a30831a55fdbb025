"""Loading a trained model with its tokenizer, refusing what does not fit."""

from __future__ import annotations

import warnings
from pathlib import Path

from safetensors import SafetensorError
from transformers import PreTrainedTokenizerFast

from ..models import CumulantConfig, CumulantForCausalLM
from .options import choose_device
from .runs import WHOLE, find_damage, newest_intact
from .tokenizer import load_tokenizer, vocabulary_size


def load_checkpoint(
    path: str, device: str = "auto"
) -> tuple[CumulantForCausalLM, PreTrainedTokenizerFast]:
    """Model (in evaluation mode) and tokenizer from a run's folder or one of its checkpoints.

    Raises:
        ValueError: no checkpoint there, weights of another shape, or a tokenizer of another size.
    """
    device = choose_device(device)
    folder = checkpoint_folder(path)
    model = load_weights(folder)
    tokenizer = load_tokenizer(folder)
    if vocabulary_size(tokenizer) > model.config.vocab_size:
        raise ValueError(
            f"tokenizer: {folder} holds a tokenizer of {vocabulary_size(tokenizer)} tokens, but the"
            f" model has {model.config.vocab_size}; use the tokenizer it was trained with"
        )
    model.generation_config.suppress_tokens = unused_ids(tokenizer, model.config.vocab_size) or None
    return model.to(device).eval(), tokenizer


def unused_ids(tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> list[int]:
    """Ids of a model that stand for no token: gaps, and the padding of its vocabulary."""
    return sorted(set(range(vocab_size)) - set(tokenizer.get_vocab().values()))


def checkpoint_folder(path: str) -> Path:
    """The folder of a run's model: its own, or that of its last complete checkpoint."""
    folder = Path(path).expanduser()
    if folder.is_file():
        raise ValueError(
            f"checkpoint: {path} is a file; expected the folder of a trained model (a text goes to"
            " --data)"
        )
    if (folder / "config.json").is_file():
        return folder
    intact, damaged = newest_intact(folder) if folder.is_dir() else (None, {})
    for place, what in damaged.items():
        if intact is None:
            raise ValueError(
                f"checkpoint: {place} is damaged ({what}), and there is no other in {folder}"
            )
        warnings.warn(f"{place} is damaged ({what}); taking {intact.name}", stacklevel=2)
    if intact is None:
        raise ValueError(
            f"checkpoint: no model at {path}; train one with: cumulant train --output {path}"
        )
    return intact


def load_weights(
    folder: Path, config: CumulantConfig | None = None, *, new: tuple[str, ...] = ()
) -> CumulantForCausalLM:
    """The model in `folder`, under its own configuration or another.

    Only weights whose names begin with one of `new` may be missing; they keep their initial values.
    """
    model: CumulantForCausalLM
    if (folder / WHOLE).is_file() and (damage := find_damage(folder)):
        raise ValueError(f"checkpoint: {folder} is damaged: {damage}")
    try:
        model, info = CumulantForCausalLM.from_pretrained(
            folder, config=config, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except (RuntimeError, OSError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"checkpoint: the weights in {folder} do not fit its config.json: {reason}"
        ) from error
    missing = (
        [name for name in info["missing_keys"] if not name.startswith(new)]
        if new
        else info["missing_keys"]
    )
    wrong = [*missing, *(entry[0] for entry in info["mismatched_keys"]), *info["unexpected_keys"]]
    if wrong:
        what = "its config.json" if config is None else "this run's options"
        raise ValueError(f"checkpoint: the weights in {folder} do not fit {what}: {wrong[0]}")
    bad = next((name for name, p in model.named_parameters() if not bool(p.isfinite().all())), None)
    if bad is not None:
        raise ValueError(
            f"checkpoint: the weights in {folder} hold NaN or infinity ({bad}): that run diverged;"
            " take an earlier checkpoint, or train with a lower --learning-rate"
        )
    return model
