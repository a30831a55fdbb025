"""Generate text from a model, whose state passes from token to token and from file to file."""

from __future__ import annotations

import hashlib
import json
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
)

from ..models import CumulantForCausalLM, cache_bytes, export_state, import_state
from ..models.decoding import begin_decoding
from ..ops.state import check_writable, load_state, save_state
from .chat import end_of_turn, render_prompt
from .stream import IncrementalDecoder, Output
from .tokenizer import encode

# at lower temperatures fp32 logits overflow, and only the likeliest token is ever drawn
LEAST_TEMPERATURE = 1e-6
CHUNK = 4096  # prompt tokens a step, which bounds the memory of a long prompt


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are drawn.

    temperature: 0 for greedy. top_k, top_p: 0 and 1 turn them off. seed: None for a new one each
    time.
    """

    max_new_tokens: int = 200
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 0.95
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.max_new_tokens < 2**31:
            raise ValueError(
                f"max_new_tokens: expected 1 to 2,147,483,647, got {self.max_new_tokens}"
            )
        if self.temperature < 0:
            raise ValueError(f"temperature: expected 0 (greedy) or more, got {self.temperature}")
        if not (self.temperature == 0 or LEAST_TEMPERATURE <= self.temperature < math.inf):
            raise ValueError(
                f"temperature: expected 0 (greedy) or a number of at least {LEAST_TEMPERATURE}, got"
                f" {self.temperature}"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected a probability above 0 and up to 1, got {self.top_p}")
        if not 0 <= self.top_k < 2**31:
            raise ValueError(f"top_k: expected 0 (off) to 2,147,483,647, got {self.top_k}")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise ValueError(f"seed: expected 0 to 2**63 - 1, got {self.seed}")


@dataclass(frozen=True)
class Generation:
    """The generated text, and its cost.

    context: tokens seen in all, including those of a loaded state.
    """

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
    chat: bool = False,
) -> Generation:
    """Continue `prompt`; an empty one starts a new text.

    Args:
        load: file of a state to continue from (`save_state`); the prompt is appended to the text
            that it has seen. The joined texts of two such runs equal the text of one run.
        save: file for the state, whose size does not depend on the context (except for softmax
            models). It is also written if the run is interrupted or its output cannot be printed.
        stream: print the text as it comes.
        chat: the prompt is a user's message, rendered by the tokenizer's chat template; the answer
            ends with its turn.

    Raises:
        ValueError: the state is another model's, or the prompt is not text. Nothing is generated.
        OSError: `save` cannot be written, and nothing is generated; or the text cannot be printed.
    """
    if save is not None:
        check_writable(save)
    past = _read_past(model, load)
    ids = [*past.unread, *_prompt_ids(tokenizer, prompt, chat)]
    if not ids:
        ids = [tokenizer.eos_token_id]
    decoder = IncrementalDecoder(tokenizer, past.tokens, past.given)
    decoder.read_prompt(ids[len(past.unread) :])
    output, cache = Output(decoder, stream=stream), past.cache
    ends = _answer_ends(model, tokenizer) if chat else None
    started = prompted = time.perf_counter()
    with _delay_interrupts(save is not None) as stop:
        read = prefill(
            model, torch.tensor([ids[:-1]], dtype=torch.long, device=model.device), cache, stop
        )
        prompted = time.perf_counter()
        new = (
            _sample_tokens(model, cache, ids[-1], options, output, stop, ends)
            if read == len(ids) - 1
            else []
        )
        seconds = time.perf_counter() - prompted
        output.close(goes_on=save is not None)
        if save is not None:
            # the model has not read the last drawn token, or more if the prompt was interrupted
            _write_past(
                save,
                Past(cache, new[-1:] or ids[read:], tuple(decoder.tokens), decoder.given),
                model,
            )
    if output.failure is not None:
        raise output.failure
    return Generation(
        output.text,
        len(new),
        cache.get_seq_length() + 1,
        prompted - started,
        seconds,
        cache_bytes(cache),
        peak_bytes(model.device),
    )


def _prompt_ids(tokenizer: PreTrainedTokenizerFast, prompt: str, chat: bool) -> list[int]:
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"prompt: expected UTF-8 text, got the byte 0x{ord(prompt[error.start]) & 0xFF:02x} at"
            f" character {error.start}"
        ) from error
    text = render_prompt(tokenizer, prompt) if chat else prompt
    (ids,) = encode(tokenizer, [text.encode()], control_tokens=chat)  # as the training text
    return [int(i) for i in ids]


def _answer_ends(model: CumulantForCausalLM, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Tokens that end an answer: those that end a text, and the template's end of turn."""
    usual, turn = model.generation_config.eos_token_id, end_of_turn(tokenizer)
    found = usual if isinstance(usual, list) else [usual, turn]
    return sorted({int(i) for i in (*found, turn) if i is not None})


def _sample_tokens(
    model: CumulantForCausalLM,
    cache: DynamicCache,
    token: int,
    options: SamplingOptions,
    output: Output,
    stop: Callable[[], bool],
    ends: list[int] | None,
) -> list[int]:
    """The tokens drawn after `token`.

    The model reads `token`, and all of the drawn tokens except the last.
    """
    if options.seed is not None:
        torch.manual_seed(options.seed)
    sampling: dict[str, Any] = {"do_sample": False}
    if options.temperature > 0:
        chosen = {
            "temperature": options.temperature,
            "top_k": options.top_k,
            "top_p": options.top_p,
        }
        sampling = {"do_sample": True, **chosen}
    if ends is not None:
        sampling["eos_token_id"] = ends
    ids: Tensor = model.generate(
        torch.tensor([[token]], device=model.device),
        attention_mask=torch.ones(
            1, cache.get_seq_length() + 1, dtype=torch.long, device=model.device
        ),
        past_key_values=cache,
        streamer=output,
        stopping_criteria=StoppingCriteriaList(
            [_StopWhen(lambda: stop() or output.failure is not None)]
        ),
        max_new_tokens=options.max_new_tokens,
        **sampling,
    )
    return ids[0, 1:].tolist()


class _StopWhen(StoppingCriteria):  # type: ignore[misc]
    """Ends a generation after a whole token, when the cache is complete."""

    def __init__(self, asked: Callable[[], bool]):
        self.asked = asked

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full((input_ids.shape[0],), self.asked(), device=input_ids.device)


@contextmanager
def _delay_interrupts(wanted: bool) -> Iterator[Callable[[], bool]]:
    """Delay interrupts (Ctrl-C, termination) to the end of the block.

    The block gets a function that says whether there was an interrupt. A second interrupt is not
    delayed. Handlers can be set in the main thread only; elsewhere nothing is delayed.
    """
    caught: list[int] = []
    if not wanted or threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, frame: Any) -> None:
        caught.append(number)
        restore()

    try:
        for number, handler in before.items():
            if handler not in (signal.SIG_IGN, None):
                signal.signal(number, note)
        yield lambda: bool(caught)
    finally:
        restore()
    if caught:
        signal.raise_signal(caught[0])


def prefill(
    model: CumulantForCausalLM,
    tokens: Tensor,
    cache: DynamicCache,
    stop: Callable[[], bool] = lambda: False,
) -> int:
    """Read ``tokens [B, T]`` into the cache in chunks, without logits, until `stop` is true.

    Returns the number of tokens read.
    """
    read = 0
    with torch.inference_mode():
        while read < tokens.shape[1] and not (read and stop()):
            chunk = tokens[:, read : read + CHUNK]
            model.model(input_ids=chunk, past_key_values=cache, use_cache=True)
            read += chunk.shape[1]
    return read


def decoding_speed(model: CumulantForCausalLM, cache: DynamicCache, steps: int = 50) -> float:
    """Tokens/s of the median greedy token, as `generate` takes it; the steps extend `cache`."""
    token, times = torch.zeros(1, dtype=torch.long, device=model.device), []
    with torch.inference_mode():
        decoder = begin_decoding(model, cache, None)
        for _ in range(steps):
            started = time.perf_counter()
            token = decoder.step(token).argmax(-1)
            int(token)  # waits for the device
            times.append(time.perf_counter() - started)
        decoder.close()
    return 1 / sorted(times)[steps // 2]


def fill_cache(model: CumulantForCausalLM, context: int) -> DynamicCache:
    """A batch-1 cache as after `context` tokens, for timing.

    Softmax models get random keys and values, which avoids their quadratic prompt. Other models
    read random tokens.
    """
    cache = DynamicCache(config=model.config)
    if set(model.config.mixers or ()) == {"softmax"}:
        config: Any = model.config
        shape = (1, config.num_key_value_heads, context, config.head_dim)
        for layer in range(len(model.config.layer_types)):
            cache.update(
                torch.randn(shape, device=model.device),
                torch.randn(shape, device=model.device),
                layer,
            )
        return cache
    prefill(model, torch.randint(model.config.vocab_size, (1, context), device=model.device), cache)
    return cache


@dataclass(frozen=True)
class Past:
    """The past of a text: the model's cache and the decoder's state.

    unread: tokens that the cache does not have yet. tokens, given: the decoder's.
    """

    cache: DynamicCache
    unread: list[int]
    tokens: tuple[int, ...] = ()
    given: int = 0


def _read_past(model: CumulantForCausalLM, load: str | None) -> Past:
    cache = DynamicCache(config=model.config)
    if load is None:
        return Past(cache, [])
    state, metadata = load_state(load, str(model.device), return_metadata=True)
    if "weights" not in metadata:
        earlier = "model" in metadata and "pending" in metadata
        why = (
            "an earlier version wrote it, without a hash of all its model's weights"
            if earlier
            else "another program wrote it"
        )
        raise ValueError(f"load_state: {load} cannot be continued: {why}; save the state again")
    if metadata["weights"] != fingerprint(model):
        raise ValueError(
            f"load_state: {load} was written by another model; load that model's folder"
        )
    try:
        text = json.loads(metadata["text"])
        unread, tokens = ([int(i) for i in text[name]] for name in ("unread", "tokens"))
        given, size = int(text["given"]), model.config.vocab_size
        known = unread and given >= 0 and all(0 <= i < size for i in (*unread, *tokens))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"load_state: {load} is damaged: its note of the text cannot be read"
        ) from error
    if not known:
        raise ValueError(
            f"load_state: {load} is damaged: its note of the text names tokens that the model"
            " does not have"
        )
    import_state(cache, state)
    return Past(cache, unread, tuple(tokens), given)


def _write_past(path: str, past: Past, model: CumulantForCausalLM) -> None:
    text = {"unread": past.unread, "tokens": past.tokens, "given": past.given}
    save_state(
        path, export_state(past.cache), {"text": json.dumps(text), "weights": fingerprint(model)}
    )


def fingerprint(model: CumulantForCausalLM) -> str:
    """A hash of all weights, which tells models apart."""
    digest = hashlib.sha256()
    for name, weight in model.state_dict().items():
        digest.update(f"{name} {weight.dtype} {list(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def peak_bytes(device: torch.device) -> int:
    """Peak memory so far: the process's on a CPU, the allocator's on CUDA."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    # ru_maxrss is in bytes on macOS, in KiB elsewhere
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
