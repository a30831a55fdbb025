"""Generate text from a model, its state carried from token to token, and from file to file."""

from __future__ import annotations

import hashlib
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedTokenizerFast, TextStreamer

from ..models import CumulantForCausalLM, cache_bytes, export_state, import_state
from ..ops.state import load_state, save_state

PIECE = 4096  # prompt tokens a step: bounds the memory of a long prompt


@dataclass(frozen=True)
class SamplingOptions:
    """max_new_tokens; temperature (0: greedy); top_k and top_p (0 and 1: off); seed (None: a new one each time)."""

    max_new_tokens: int = 200
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 0.95
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: expected at least 1, got {self.max_new_tokens}")
        if self.temperature < 0:
            raise ValueError(f"temperature: expected 0 (greedy) or more, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected a probability above 0 and up to 1, got {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k: expected 0 (off) or more, got {self.top_k}")


@dataclass(frozen=True)
class Generation:
    """What was generated, and what it took. context: tokens seen in all, those of a loaded state included."""

    text: str
    new_tokens: int
    context: int
    prompt_seconds: float
    seconds: float
    state_bytes: int
    peak_bytes: int

    @property
    def tokens_per_second(self) -> float:
        return self.new_tokens / self.seconds


def generate(
    model: CumulantForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompt: str,
    options: SamplingOptions,
    *,
    load: str | None = None,
    save: str | None = None,
    stream: bool = False,
) -> Generation:
    """Continue `prompt`; an empty one starts a new text.

    Args:
        load: file of a state to go on from (`save_state`); the prompt is appended to what it has seen.
        save: file to leave the state in, of a size that does not depend on the context (softmax models aside).
        stream: print the text as it comes.
    """
    if save is not None and not Path(save).absolute().parent.is_dir():
        raise ValueError(f"save_state: no such folder: {Path(save).absolute().parent}")
    cache, pending = _initial_cache(model, load)
    ids = [*pending, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
    if not ids:
        ids = [tokenizer.eos_token_id]
    started = time.perf_counter()
    tokens = torch.tensor([ids], device=model.device)
    prefill(model, tokens[:, :-1], cache)
    prompted = time.perf_counter()
    past = cache.get_seq_length()
    if options.seed is not None:
        torch.manual_seed(options.seed)
    output = model.generate(
        tokens[:, -1:],
        attention_mask=torch.ones(1, past + 1, dtype=torch.long, device=model.device),
        past_key_values=cache,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None,
        max_new_tokens=options.max_new_tokens,
        **_sampling(options),
    )
    seconds = time.perf_counter() - prompted
    new = output[0, 1:].tolist()
    if save is not None:
        # the last token was drawn but not yet read by the model
        metadata = {"pending": str(new[-1]), "model": fingerprint(model)}
        save_state(save, export_state(cache), metadata)
    return Generation(
        tokenizer.decode(new, skip_special_tokens=True),
        len(new),
        past + 1 + len(new),
        prompted - started,
        seconds,
        cache_bytes(cache),
        peak_bytes(model.device),
    )


def prefill(model: CumulantForCausalLM, tokens: Tensor, cache: DynamicCache) -> None:
    """Read ``tokens [B, T]`` into the cache, a piece at a time, without logits."""
    with torch.inference_mode():
        for piece in tokens.split(PIECE, 1):
            if piece.shape[1]:
                model.model(input_ids=piece, past_key_values=cache, use_cache=True)


def decoding_speed(model: CumulantForCausalLM, cache: DynamicCache, steps: int = 50) -> float:
    """Tokens/s of greedy single-token steps onto `cache` (which they extend); the median step counts."""
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    times = []
    with torch.inference_mode():
        for _ in range(steps):
            started = time.perf_counter()
            token = model(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
            int(token)  # waits for the device
            times.append(time.perf_counter() - started)
    return 1 / sorted(times)[steps // 2]


def fill_cache(model: CumulantForCausalLM, context: int) -> DynamicCache:
    """A batch-1 cache as after `context` tokens, with random numbers for keys and values: for timing, without a softmax
    model's quadratic prompt. Mixers of fixed state read random tokens."""
    cache = DynamicCache(config=model.config)
    if set(model.config.mixers or ()) == {"softmax"}:
        config: Any = model.config
        shape = (1, config.num_key_value_heads, context, config.head_dim)
        for layer in range(len(model.config.layer_types)):
            cache.update(torch.randn(shape, device=model.device), torch.randn(shape, device=model.device), layer)
        return cache
    prefill(model, torch.randint(model.config.vocab_size, (1, context), device=model.device), cache)
    return cache


def _initial_cache(model: CumulantForCausalLM, load: str | None) -> tuple[DynamicCache, list[int]]:
    cache = DynamicCache(config=model.config)
    if load is None:
        return cache, []
    state, metadata = load_state(load, str(model.device), return_metadata=True)
    if metadata.get("model") != fingerprint(model):
        raise ValueError(f"load_state: {load} was written by another model; load that model's folder")
    import_state(cache, state)
    return cache, [int(metadata["pending"])]


def fingerprint(model: CumulantForCausalLM) -> str:
    """Tells models apart: a hash of the embedding's weights."""
    weight = model.model.embed_tokens.weight.detach().float().cpu().contiguous()
    return hashlib.sha256(weight.numpy().tobytes()).hexdigest()[:16]


def _sampling(options: SamplingOptions) -> dict[str, Any]:
    if options.temperature == 0:
        return {"do_sample": False}
    return {
        "do_sample": True,
        "temperature": options.temperature,
        "top_k": options.top_k,
        "top_p": options.top_p,
    }


def peak_bytes(device: torch.device) -> int:
    """Most memory held so far: the process's on a CPU, the allocator's on CUDA."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
