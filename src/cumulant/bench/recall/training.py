"""Trains one model on the recall test, and measures its accuracy and its state."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, set_seed

from ...models import CumulantForCausalLM, cache_bytes
from .mechanisms import Setting, build_model
from .task import Task

ENOUGH = 0.999  # accuracy at all numbers of pairs, at which training stops


def question_logits(model: CumulantForCausalLM, tokens: Tensor, places: Tensor) -> Tensor:
    """Logits at the positions of the questions: ``[rows, pairs, vocabulary]``."""
    hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state
    logits: Tensor = model.logits(
        hidden.gather(1, places[..., None].expand(-1, -1, hidden.shape[2]))
    )
    return logits


@torch.inference_mode()
def measure_accuracy(
    model: CumulantForCausalLM, task: Task, pairs: int, seed: int, rows: int = 256
) -> float:
    """Share of the questions with the right answer.

    All models of a seed get the same sequences.
    """
    tokens, places, values = (
        x.to(model.device)
        for x in task.draw_sequences(rows, pairs, np.random.default_rng([seed, pairs, 1]))
    )
    right = [
        question_logits(model, *part).argmax(-1)
        for part in zip(tokens.split(64), places.split(64), strict=True)
    ]
    return float((torch.cat(right) == values).float().mean())


def parameter_groups(model: CumulantForCausalLM) -> list[dict[str, Any]]:
    """Weight decay for all but gates, whose spans it would shorten."""
    gates: list[Tensor] = []
    others: list[Tensor] = []
    for name, parameter in model.named_parameters():
        (gates if ".decay." in name else others).append(parameter)
    return [{"params": others}, *([{"params": gates, "weight_decay": 0.0}] if gates else [])]


def train_model(setting: Setting, device: str = "cpu", every: int = 200) -> dict[str, Any]:
    """Train a model, and measure its accuracy by number of pairs.

    The result also has its size, its state, its time, and its accuracy during training.
    """
    task = setting.task
    set_seed(setting.seed)
    model = build_model(setting).to(device)
    optimizer = torch.optim.AdamW(
        parameter_groups(model), lr=setting.learning_rate, weight_decay=0.1
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, setting.steps)
    random = np.random.default_rng([setting.seed, 0])
    started, curve, found = time.perf_counter(), [], {}
    for step in range(1, setting.steps + 1):
        pairs = task.pairs[step % len(task.pairs)]
        tokens, places, values = (
            x.to(device) for x in task.draw_sequences(setting.batch, pairs, random)
        )
        model.train()
        loss = F.cross_entropy(
            question_logits(model, tokens, places).flatten(0, 1), values.flatten()
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % every == 0 or step == setting.steps:
            model.eval()
            found = {str(n): measure_accuracy(model, task, n, setting.seed) for n in task.pairs}
            curve.append([step, loss.item(), *found.values()])
            if min(found.values()) >= ENOUGH:
                break
    return {
        "accuracy": found,
        "steps_taken": step,
        "seconds": time.perf_counter() - started,
        "parameters": sum(p.numel() for p in model.parameters()),
        "state_bytes": state_bytes(model, task.length),
        "curve": curve,
    }


@torch.inference_mode()
def state_bytes(model: CumulantForCausalLM, length: int) -> int:
    """Bytes that the model keeps for one sequence after `length` tokens."""
    cache = DynamicCache(config=model.config)
    tokens = torch.zeros(1, length, dtype=torch.long, device=model.device)
    model.eval()(input_ids=tokens, past_key_values=cache, use_cache=True)
    return cache_bytes(cache)
