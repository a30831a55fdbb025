"""Time and memory of a training step, and the size of the state, for each mechanism."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch
from transformers import DynamicCache, set_seed

from ...models import CumulantConfig, CumulantForCausalLM, cache_bytes


@dataclass(frozen=True)
class Cost:
    """The cost of a mechanism.

    seconds: of a training step. kept_bytes: kept by the step for its backward pass.
    state_bytes: of the cache of one sequence, after the context.
    """

    seconds: float
    kept_bytes: int
    state_bytes: int


def measure_costs(
    configs: dict[str, CumulantConfig],
    *,
    batch: int,
    context: int,
    device: str = "cpu",
    rounds: int = 5,
) -> dict[str, Cost]:
    """Medians of `rounds` steps; mechanisms take turns, so disturbances affect all alike."""
    set_seed(0)
    ids = torch.randint(
        next(iter(configs.values())).vocab_size, (batch, context + 1), device=device
    )
    models = {
        name: CumulantForCausalLM(config).to(device).train() for name, config in configs.items()
    }
    optimizers = {name: torch.optim.AdamW(model.parameters()) for name, model in models.items()}
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds + 1):
        for name, model in models.items():
            start = _now(device)
            _loss(model, ids).backward()
            optimizers[name].step()
            optimizers[name].zero_grad()
            times[name].append(_now(device) - start)
    return {
        name: Cost(
            statistics.median(times[name][1:]),
            _kept_bytes(model, ids),
            _state_bytes(model, context),
        )
        for name, model in models.items()
    }


def _now(device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


def _loss(model: CumulantForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    loss: torch.Tensor = model(
        input_ids=ids[:, :-1], shift_labels=ids[:, 1:].contiguous(), skip_logits=True
    ).loss
    return loss


def _kept_bytes(model: CumulantForCausalLM, ids: torch.Tensor) -> int:
    """Bytes of all tensors that a step keeps for its backward pass, except the weights."""
    found: dict[int, int] = {}

    def add_storage(x: torch.Tensor) -> torch.Tensor:
        found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(add_storage, lambda x: x):
        loss = _loss(model, ids)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    del loss
    return sum(size for where, size in found.items() if where not in own)


@torch.inference_mode()
def _state_bytes(model: CumulantForCausalLM, context: int) -> int:
    cache = DynamicCache(config=model.config)
    model.eval()(
        torch.zeros(1, context, dtype=torch.long, device=model.device),
        past_key_values=cache,
        use_cache=True,
    )
    return cache_bytes(cache)
