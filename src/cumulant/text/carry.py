"""States that windows start from: those that the windows before ended with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from transformers import DynamicCache
from transformers.cache_utils import Cache

from ..models import (
    CumulantConfig,
    CumulantForCausalLM,
    ModelState,
    export_state,
    import_state,
)
from ..ops.state import load_state, save_state

FOLDER = "carried"  # in a checkpoint


def check_carries(config: CumulantConfig) -> None:
    """Refuse a model whose states grow, or whose positions count padding."""
    if "full_attention" in config.layer_types:
        raise ValueError(
            "carry_state: needs a model whose states have a fixed size, and the cache of softmax"
            " attention and of gated attention units grows; use another preset, or --carry-state"
            " none"
        )
    if config.count_padding:
        raise ValueError(
            "carry_state: a model with count_padding=true cannot read rows with pasts of different"
            " lengths; use --carry-state none"
        )


class CarriedStates:
    """The states of the rows of one process, one `ModelState` for each batch of a step.

    Over all processes the windows of a step are rows 0 to R - 1. Process p has the rows
    ``(i · processes + p) · batch`` onwards in its batch i. So a row is the same window of every
    step, in whatever way the rows are spread over batches and processes.

    Rows that start without a past get an empty state: what the model returns for masked tokens
    alone.
    """

    def __init__(
        self,
        model: CumulantForCausalLM,
        *,
        batch: int,
        accumulate: int,
        context: int,
        process: int = 0,
        processes: int = 1,
    ):
        check_carries(model.config)
        self.model, self.batch, self.context = model, batch, context
        self.rows = accumulate * processes * batch
        self.firsts = [(i * processes + process) * batch for i in range(accumulate)]
        self.empty = empty_state(model, context)
        self.states = [self._rows_of(self.empty, [0] * batch) for _ in self.firsts]
        self.next = 0  # the batch of the step that comes next

    def arguments(self, fresh: Tensor) -> dict[str, Any]:
        """The model's arguments for the next batch; rows with ``fresh [B]`` have no past."""
        if len(fresh) != self.batch:
            raise ValueError(
                f"carry_state: expected batches of {self.batch} windows, got {len(fresh)}; each"
                " row goes on from a row of the step before"
            )
        state = pytree.tree_map(
            lambda now, empty: _replace_rows(now, empty, fresh), self.states[self.next], self.empty
        )
        cache = import_state(DynamicCache(config=self.model.config), state)
        found: dict[str, Any] = {"past_key_values": cache, "use_cache": True}
        if self.model.config.counts_positions:  # the model counts each row's tokens by the mask
            past = int(state.position.max())
            places = torch.arange(past + self.context, device=fresh.device)
            found["attention_mask"] = places >= past - state.position[:, None]
        self.states[self.next] = state
        return found

    def keep(self, cache: Cache) -> None:
        """Keep the states after the batch, without their gradients' history."""
        position = self.states[self.next].position + self.context
        layers = export_state(cache).layers
        self.states[self.next] = ModelState(layers, position).detach()
        self.next = (self.next + 1) % len(self.states)

    def save(self, checkpoint: Path) -> None:
        """Write a file for each batch, named by its first row."""
        folder = checkpoint / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        for first, state in zip(self.firsts, self.states, strict=True):
            save_state(folder / f"{first:08d}.safetensors", state)

    def load(self, checkpoint: Path) -> None:
        """Read this process's rows, which other processes or batches may have written.

        Raises:
            ValueError: files are missing or damaged.
        """
        files = sorted((checkpoint / FOLDER).glob("*.safetensors"))
        parts = [load_state(path, self.empty.position.device) for path in files]
        found = sum(len(part.position) for part in parts)
        if found != self.rows:
            raise ValueError(
                f"resume: {checkpoint / FOLDER} holds the states of {found} rows, not of"
                f" {self.rows}"
            )
        whole = pytree.tree_map(
            lambda *rows: None if rows[0] is None else torch.cat(rows), parts[0], *parts[1:]
        )
        self.states = [
            self._rows_of(whole, list(range(first, first + self.batch))) for first in self.firsts
        ]

    def _rows_of(self, state: ModelState, rows: list[int]) -> ModelState:
        return state.select(torch.tensor(rows))


@torch.no_grad()
def empty_state(model: CumulantForCausalLM, length: int) -> ModelState:
    """The state ``[1, ...]`` before any token, in the shapes that it keeps while it is carried.

    The model reads `length` masked tokens at a time until the shapes do not change, since a sliding
    window's state grows up to the window.
    """
    training = model.training
    model.eval()
    try:
        cache, shapes, past = DynamicCache(config=model.config), None, 0
        while True:
            ids = torch.zeros(1, length, dtype=torch.int64, device=model.device)
            mask = torch.zeros(1, past + length, dtype=torch.int64, device=model.device)
            model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True)
            state, past = export_state(cache), past + length
            now = {name: x.shape for name, x in state.tensors().items()}
            if now == shapes:
                return ModelState(state.layers, torch.zeros_like(state.position))
            shapes = now
    finally:
        model.train(training)


def _replace_rows(now: Tensor | None, empty: Tensor | None, fresh: Tensor) -> Tensor | None:
    """`now` with the rows marked by ``fresh [B]`` replaced by ``empty [1, ...]``."""
    if now is None or empty is None:
        assert now is empty
        return None
    marked = fresh.view(-1, *[1] * (now.dim() - 1))
    return torch.where(marked, empty.to(now.dtype), now)
