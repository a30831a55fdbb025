"""Multi-query associative recall (Arora et al. 2023, "Zoology"): the task, and one model trained on it.

A sequence states n pairs of a key and its value, then asks for each key once: ``k1 v1 … kn vn`` and behind them
slots of two tokens, in which the keys stand again, in early slots more likely (slot g: ``p(g) ∝ (g + 1)^(a - 1)``,
a = 0.01). At a key's second place the model is to say its value. Everything else is token 0.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, set_seed

from ..models import CumulantForCausalLM, cache_bytes, from_preset
from ..nn import ShortConvolution

POWER = 0.01
ENOUGH = 0.999  # accuracy on all numbers of pairs at which training stops


@dataclass(frozen=True)
class Task:
    """Sequences of `length` tokens out of `vocabulary`, with as many pairs as one of `pairs`."""

    length: int = 128
    vocabulary: int = 512
    pairs: tuple[int, ...] = (8, 16, 32)

    def __post_init__(self) -> None:
        if not self.pairs or min(self.pairs) < 1:
            raise ValueError(f"pairs: expected numbers of at least 1, got {list(self.pairs)}")
        if self.length % 2 or 4 * max(self.pairs) > self.length:
            raise ValueError(
                f"length: expected an even number of at least {4 * max(self.pairs)}, for {max(self.pairs)} pairs and "
                f"as many questions, got {self.length}"
            )
        if max(self.pairs) > self.vocabulary // 2 - 1:
            raise ValueError(f"vocabulary: {self.vocabulary} tokens hold no {max(self.pairs)} different keys")

    def draw(self, rows: int, pairs: int, random: Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens ``[rows, length]``; places of the questions and their answers ``[rows, pairs]``."""
        half = self.vocabulary // 2

        def different(first: int, last: int) -> np.ndarray:
            return first + random.random((rows, last - first)).argpartition(pairs - 1)[:, :pairs]

        keys = random.permuted(different(1, half), axis=1)
        values = random.permuted(different(half, self.vocabulary), axis=1)
        tokens = np.zeros((rows, self.length), dtype=np.int64)
        tokens[:, : 2 * pairs : 2], tokens[:, 1 : 2 * pairs : 2] = keys, values
        slots = (self.length - 2 * pairs) // 2
        # the first `pairs` arrivals of a race at rates p are a draw without replacement by p
        arrivals = random.exponential(size=(rows, slots)) * (np.arange(slots) + 1.0) ** (1 - POWER)
        places = 2 * pairs + 2 * arrivals.argsort(axis=1)[:, :pairs]
        np.put_along_axis(tokens, places, keys, axis=1)
        return torch.from_numpy(tokens), torch.from_numpy(places), torch.from_numpy(values)


@dataclass(frozen=True)
class Setting:
    """One model and how it is trained. mechanism: a name of `MECHANISMS`. conv: the first of its two layers is a short
    convolution; else both mix. steps of `batch` sequences, AdamW with weight decay 0.1, cosine to 0."""

    task: Task
    mechanism: str
    conv: bool
    width: int
    learning_rate: float
    seed: int
    steps: int
    batch: int = 32


# taylor-K: queries and keys of K numbers; window-W: softmax over the last W tokens
MECHANISMS: dict[str, dict[str, Any]] = {
    "softmax": {"mixer": "softmax"},
    "window-16": {"mixer": "sliding_window", "sliding_window": 16},
    "window-64": {"mixer": "sliding_window", "sliding_window": 64},
    "linear": {"mixer": "linear"},
    "taylor-8": {"mixer": "taylor", "taylor_head_dim": 8},
    "taylor-16": {"mixer": "taylor", "taylor_head_dim": 16},
    "taylor-24": {"mixer": "taylor", "taylor_head_dim": 24},
    "higher_order": {"mixer": "taylor", "taylor_head_dim": 16, "qk_norm": True},
    "based": {"mixer": "taylor", "taylor_head_dim": 16, "window": 16},
    "flash": {"mixer": "flash", "group_size": 32, "query_key_dim": 32, "expansion_factor": 1.0},
    "elita": {"mixer": "elita"},
}


def build(setting: Setting) -> CumulantForCausalLM:
    """Two layers (based: three, with its sliding window) of one head, no feed-forwards, tied embeddings."""
    fields = dict(MECHANISMS[setting.mechanism])
    mixer, window = fields.pop("mixer"), fields.pop("window", None)
    mixers = ["short_convolution" if setting.conv else mixer, mixer]
    if window is not None:
        mixers.append("sliding_window")
        fields["sliding_window"] = window
    config = from_preset(
        "taylor",
        conv_size=0,
        vocab_size=setting.task.vocabulary,
        hidden_size=setting.width,
        num_hidden_layers=len(mixers),
        num_attention_heads=1,
        feed_forward="none",
        rotary=not setting.conv,
        horizon=setting.task.length,
        initializer_range=setting.width**-0.5,  # products of projections vanish at the usual 0.02
        mixers=mixers,
        **fields,
    )
    model = CumulantForCausalLM(config)
    for module in model.modules():
        if isinstance(module, ShortConvolution):  # all taps alike, as in Zoology, not the identity
            nn.init.uniform_(module.weight, -(module.size**-0.5), module.size**-0.5)
    return model


def answers(model: CumulantForCausalLM, tokens: Tensor, places: Tensor) -> Tensor:
    """Logits at the questions alone: ``[rows, pairs, vocabulary]``."""
    hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state
    logits: Tensor = model.logits(hidden.gather(1, places[..., None].expand(-1, -1, hidden.shape[2])))
    return logits


@torch.inference_mode()
def accuracy(model: CumulantForCausalLM, task: Task, pairs: int, seed: int, rows: int = 256) -> float:
    """Share of the questions answered right, over the same sequences for every model of a seed."""
    tokens, places, values = (
        x.to(model.device) for x in task.draw(rows, pairs, np.random.default_rng([seed, pairs, 1]))
    )
    right = [answers(model, *part).argmax(-1) for part in zip(tokens.split(64), places.split(64), strict=True)]
    return float((torch.cat(right) == values).float().mean())


def train(setting: Setting, device: str = "cpu", every: int = 200) -> dict[str, Any]:
    """What became of the model: accuracy by number of pairs, state, time."""
    task = setting.task
    set_seed(setting.seed)
    model = build(setting).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=setting.learning_rate, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, setting.steps)
    random = np.random.default_rng([setting.seed, 0])
    started, curve, found = time.perf_counter(), [], {}
    for step in range(1, setting.steps + 1):
        pairs = task.pairs[step % len(task.pairs)]
        tokens, places, values = (x.to(device) for x in task.draw(setting.batch, pairs, random))
        model.train()
        loss = F.cross_entropy(answers(model, tokens, places).flatten(0, 1), values.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % every == 0 or step == setting.steps:
            model.eval()
            found = {str(n): accuracy(model, task, n, setting.seed) for n in task.pairs}
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
    """What the model keeps of so long a context, a sequence."""
    cache = DynamicCache(config=model.config)
    tokens = torch.zeros(1, length, dtype=torch.long, device=model.device)
    model.eval()(input_ids=tokens, past_key_values=cache, use_cache=True)
    return cache_bytes(cache)
