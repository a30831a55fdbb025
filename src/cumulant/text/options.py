"""Options of a training run."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field, fields
from typing import Any

from .schedule import SCHEDULES

CARRY_STATE = ("none", "passing", "document")

# the presets of cumulant.models, which takes seconds to import
PRESETS = (
    "softmax",
    "linear",
    "taylor",
    "higher_order",
    "based",
    "flash",
    "elita",
    "gated_linear",
    "gated_taylor",
    "gated_based",
)


def option(default: Any, text: str) -> Any:
    """A field with the help that the command line shows."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class TrainingOptions:
    """The options of a training run, as on the command line; checked on construction."""

    output: str = option("runs/model", "folder for checkpoints, logs and the final model")
    data: str | list[str] | None = option(  # noqa: RUF009
        None,
        "file, folder or glob (may be repeated), - for standard input, enwik8, or id of a Hugging"
        " Face dataset; default: Python's standard library",
    )
    encoding: str | None = option(
        None, "encoding of the files, if it is not UTF-8; for example latin-1"
    )
    heldout: float = option(0.05, "share of the text held out for evaluation")
    text_column: str = option("text", "column of a dataset that holds the text")
    tokenizer: str | None = option(None, "a tokenizer.json or a folder with one; default: bytes")
    train_bpe: int | None = option(None, "train a byte-level BPE of so many tokens on the text")
    preset: str = option("taylor", f"model: {', '.join(PRESETS)}")
    model_option: list[str] | None = option(  # noqa: RUF009
        None,
        "field=value of the model's configuration, for example group_size=128; may be repeated",
    )
    init_from: str | None = option(
        None, "folder of a trained model to start from, with its tokenizer and its sizes"
    )
    freeze_backbone: bool = option(False, "train only the feed-forward over the logits")
    logit_ffn: int | None = option(None, "width of a feed-forward over the logits; default: none")
    width: int = option(256, "model dim")
    depth: int = option(4, "layers")
    heads: int = option(4, "attention heads")
    intermediate: int | None = option(
        None, "width of the feed-forward; default: 8/3 of the model dim"
    )
    context: int = option(256, "tokens in a window")
    batch: int = option(16, "windows a step and process")
    accumulate: int = option(1, "batches a step")
    disjoint: bool = option(
        False, "windows side by side, each once in every pass over the text, shuffled"
    )
    packed: bool = option(
        False, "pack documents into windows, none seeing another, instead of windows anywhere"
    )
    carry_state: str = option(
        "none",
        "what a window starts from: none (no past), passing (the state that its row of the batch"
        " ended the step before with, whatever text that was) or document (the same, while rows"
        " walk along documents window after window)",
    )
    carry_windows: int = option(
        16,
        "windows after which a row starts without a past again, with --carry-state; 0: no limit",
    )
    steps: int = option(1000, "optimizer steps")
    learning_rate: float = option(2e-3, "peak learning rate")
    schedule: str = option(
        "cosine",
        "schedule of the learning rate: cosine (to zero) or capped_inverse_sqrt (times min(1, 10 /"
        " sqrt(step)))",
    )
    warmup: float = option(0.1, "share of the steps in which the learning rate rises; cosine only")
    adam_beta2: float = option(0.95, "AdamW's second beta")
    weight_decay: float = option(0.1, "AdamW's weight decay")
    clip: float = option(1.0, "largest gradient norm")
    dropout: float = option(0.0, "dropout of mixers and feed-forwards")
    evaluate_every: int = option(
        0,
        "steps between evaluations on the held-out text, of which the best model is kept; 0: only"
        " at the end",
    )
    save_every: int = option(
        0, "steps between checkpoints; 0: with each evaluation, else ten times"
    )
    seed: int = option(0, "seed of weights and batches")
    bf16: bool | None = option(
        None, "autocast to bfloat16; without either, on GPUs that multiply in it"
    )
    device: str = option("auto", "auto, cpu or cuda")
    fsdp: bool = option(False, "shard the model over the processes of torchrun")
    gradient_checkpointing: bool = option(False, "recompute layers in the backward pass")
    resume: bool = option(
        False,
        "continue from the last complete checkpoint in the output folder, with its options; --steps"
        " may be more",
    )

    def __post_init__(self) -> None:
        self._check_types()
        for name in ("output", "tokenizer", "init_from"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, os.path.expanduser(getattr(self, name)))
        self._check_sizes()
        self._check_numbers()
        self._check_combinations()
        self._check_carry()
        self._check_optimizer()
        check_device(self.device)
        self.overrides()

    def _check_sizes(self) -> None:
        if not self.output:
            raise ValueError("output: expected a folder, got an empty name")
        if self.preset not in PRESETS:
            raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, got {self.preset!r}")
        for name in ("width", "depth", "heads", "context", "batch", "accumulate", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("evaluate_every", "save_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected 0 or more steps, got {getattr(self, name)}")
        if self.carry_windows < 0:
            raise ValueError(f"carry_windows: expected 0 or more, got {self.carry_windows}")
        for name in ("intermediate", "logit_ffn"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")

    def _check_numbers(self) -> None:
        for name in ("weight_decay", "clip"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(
                    f"{name}: expected a finite number, 0 or more, got {getattr(self, name)}"
                )
        if self.train_bpe is not None and self.train_bpe < 257:
            raise ValueError(
                "train_bpe: expected at least 257 tokens (the bytes and the end of text), got"
                f" {self.train_bpe}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: expected a probability below 1, got {self.dropout}")
        if not 0 < self.heldout < 1:
            raise ValueError(f"heldout: expected a share between 0 and 1, got {self.heldout}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed: expected a number from 0 to 2**32 - 1, got {self.seed}")

    def _check_types(self) -> None:
        kinds: dict[str, Any] = {
            "int": int,
            "float": (int, float),
            "str": str,
            "bool": bool,
            "list[str]": list,
            "None": type(None),
        }
        for f in fields(self):
            value, declared = getattr(self, f.name), str(f.type)
            parts = declared.split(" | ")
            if not any(isinstance(value, kinds[part]) for part in parts) or (
                isinstance(value, bool) and "bool" not in parts
            ):
                raise ValueError(f"{f.name}: expected {declared}, got {value!r}")
            if isinstance(value, list) and not all(isinstance(item, str) for item in value):
                raise ValueError(f"{f.name}: expected {declared}, got {value!r}")

    def _check_optimizer(self) -> None:
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup: expected a share of the steps below 1, got {self.warmup}")
        if not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            raise ValueError(f"learning_rate: expected a positive number, got {self.learning_rate}")
        if self.schedule not in SCHEDULES:
            raise ValueError(
                f"schedule: expected one of {', '.join(SCHEDULES)}, got {self.schedule!r}"
            )
        if not 0 < self.adam_beta2 < 1:
            raise ValueError(
                f"adam_beta2: expected a number between 0 and 1, got {self.adam_beta2}"
            )

    def _check_combinations(self) -> None:
        if self.save_every and self.evaluate_every and self.save_every % self.evaluate_every:
            raise ValueError(
                f"save_every: expected a multiple of evaluate_every={self.evaluate_every}, so that"
                f" the best model is kept, got {self.save_every}"
            )
        if self.tokenizer is not None and self.train_bpe is not None:
            raise ValueError(
                "train_bpe: pass either a tokenizer or the size of one to train, not both"
            )
        if self.init_from is not None and (
            self.tokenizer is not None or self.train_bpe is not None
        ):
            raise ValueError("init_from: the model there comes with its tokenizer; pass no other")
        if self.freeze_backbone and (self.init_from is None or self.logit_ffn is None):
            raise ValueError(
                "freeze_backbone: needs a trained model, --init-from, and something to train,"
                " --logit-ffn"
            )
        if self.disjoint and self.packed:
            raise ValueError("disjoint: pass either disjoint windows or packed documents, not both")

    def _check_carry(self) -> None:
        if self.carry_state not in CARRY_STATE:
            raise ValueError(
                f"carry_state: expected one of {', '.join(CARRY_STATE)}, got {self.carry_state!r}"
            )
        if self.carry_state == "none":
            return
        for name, reason in (
            ("packed", "packed documents have no single state to carry"),
            ("gradient_checkpointing", "recomputed layers keep no state"),
            ("fsdp", "sharded models carry no states yet"),
        ):
            if getattr(self, name):
                raise ValueError(
                    f"carry_state: {reason}; pass either --carry-state or"
                    f" --{name.replace('_', '-')}, not both"
                )
        if self.carry_state == "document" and self.disjoint:
            raise ValueError(
                "carry_state: document walks along the text in its order, and disjoint windows are"
                " shuffled; leave --disjoint out"
            )

    def overrides(self) -> dict[str, Any]:
        """The fields and values of `model_option`; values are read as JSON, else as plain text."""
        found: dict[str, Any] = {}
        for item in self.model_option or ():
            name, equals, text = item.partition("=")
            if not (name and equals):
                raise ValueError(f"model_option: expected field=value, got {item!r}")
            try:
                found[name] = json.loads(
                    {"True": "true", "False": "false", "None": "null"}.get(text, text)
                )
            except json.JSONDecodeError:
                found[name] = text
        return found


def check_device(device: str) -> None:
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device: expected auto, cpu or cuda, got {device!r}")
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "device: cuda was asked for, but PyTorch sees no CUDA device here; use --device cpu"
        )


def choose_device(device: str) -> str:
    """The device "cpu" or "cuda"; for "auto", a GPU if there is one."""
    import torch

    check_device(device)
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
