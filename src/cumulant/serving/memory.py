"""How much memory a server will use at most, before it serves."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch

from ..models.rows import cache_bytes_after, grows, reads_exactly, rows_bytes
from ..text.generate import peak_bytes
from .sampling import log_probabilities

UNITS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
CONNECTIONS = 256 * 2**20  # for connections, texts and Python's own
LEAST_ROOM = 256  # tokens of a context
SHARE = 0.75  # of what is left, for the contexts of models whose states grow


def parse_size(name: str, text: str) -> int:
    """Bytes from a size such as 2GiB, 512MiB or 1500000."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:I?B)?\s*", text.upper())
    if found is None:
        raise ValueError(f"{name}: expected a size such as 2GiB or 512MiB, got {text!r}")
    return int(float(found[1]) * 1024 ** UNITS[found[2]])


def show_size(size: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if abs(size) < 1024:
            return f"{size:,.0f} {unit}"
        size /= 1024
    return f"{size:,.2f} GiB"


@dataclass(frozen=True)
class MemoryPlan:
    """What a server uses at most.

    process: the interpreter, its libraries, all weights and what reading takes.
    slots: the states of replies, and of prompts that are being read.
    snapshots: states of prefixes and of documents.
    room: tokens of a context, or None if states do not grow.
    """

    process: int
    slots: int
    snapshots: int
    room: int | None

    @property
    def total(self) -> int:
        return self.process + self.slots + self.snapshots


def slots_bytes(model: Any, slots: int, room: int, piece: int) -> int:
    """The slots, and states of prompts that are read outside of them, one of an ended reply's too.

    Each piece makes such a state anew, so there are two.
    """
    size = rows_bytes(model, slots, room, piece)
    if not reads_exactly(model):
        size += 2 * (slots + 1) * cache_bytes_after(model, room)
    return size


def warm_up(model: Any, piece: int) -> None:
    """Read a piece and take a step, so that the process has what it needs for them."""
    with torch.inference_mode():
        for length in (piece, 1):
            ids = torch.zeros(1, length, dtype=torch.long, device=model.device)
            logits = model(ids, use_cache=True, logits_to_keep=length).logits
            log_probabilities(logits[0].float().cpu().numpy())


def plan_memory(
    models: list[Any], slots: int, memory: int, piece: int, context: int | None = None
) -> list[MemoryPlan]:
    """A plan for each model, which together use `memory` bytes at most.

    context: tokens of a context, for models whose states grow; None: what the memory allows.

    Raises:
        ValueError: it is too little.
    """
    for model in models:
        warm_up(model, piece)
    process = peak_bytes(torch.device("cpu")) + CONNECTIONS
    left = (memory - process) // len(models)
    plans = []
    for model in models:
        room = _room(model, slots, left, piece, context)
        size = slots_bytes(model, slots, room or 1, piece)
        plans.append(MemoryPlan(process // len(models), size, left - size, room))
    least = process + sum(
        slots_bytes(model, slots, (context or LEAST_ROOM) if grows(model) else 1, piece)
        for model in models
    )
    if any(plan.snapshots < 0 for plan in plans):
        raise ValueError(
            f"memory: {show_size(memory)} are too little for {slots} slots: this needs"
            f" {show_size(least)} and room for snapshots; pass more --memory or fewer --slots"
        )
    return plans


def _room(model: Any, slots: int, left: int, piece: int, context: int | None) -> int | None:
    if not grows(model):
        return None
    if context is not None:
        return context
    fixed, one = (slots_bytes(model, slots, n, piece) for n in (0, 1))
    room = int((SHARE * left - fixed) // max(one - fixed, 1))
    return max(room, LEAST_ROOM)
