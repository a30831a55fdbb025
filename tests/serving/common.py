"""Small models with random weights, a tokenizer of bytes, and what an engine answers."""

from __future__ import annotations

import time
from contextlib import contextmanager

import torch

from cumulant.models import CumulantForCausalLM, from_preset
from cumulant.serving import Engine, Read, Request, SamplingOptions, Update
from cumulant.text.tokenizer import byte_tokenizer

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' +"
    " '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PIECE = 16


def chat_tokenizer():
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    return tokenizer


def build(preset="taylor", **fields):
    torch.manual_seed(0)
    options = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    options |= {"vocab_size": 259, "initializer_range": 0.3, "sliding_window": 6, "group_size": 5}
    model = CumulantForCausalLM(from_preset(preset, **options | fields)).eval()
    model.generation_config.eos_token_id = 256
    return model


def prompt(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(0, 256, (count,), generator=generator).tolist())


@contextmanager
def running(model, **options):
    """An engine that is started and, at the end, stopped."""
    tokenizer = options.pop("tokenizer", None) or chat_tokenizer()
    room = 512 if "full_attention" in model.config.layer_types else None
    engine = Engine(model, tokenizer, **{"piece": PIECE, "threads": 1, "room": room} | options)
    engine.start()
    try:
        yield engine
    finally:
        assert engine.stop(drain=False, timeout=60)


def sampling(**options):
    return SamplingOptions(**{"max_tokens": 12, "seed": 5} | options)


def request(count=40, text=0, **options):
    """A request with the prompt number `text`; options: its fields, and those of sampling."""
    mine = {name: options.pop(name) for name in list(options) if name in Request.__annotations__}
    return Request(**{"tokens": prompt(count, text), "sampling": sampling(**options)} | mine)


def answer(ticket):
    """All that a ticket tells: of each reply its text, tokens, scores and end."""
    replies, read = {}, None
    for event in ticket:
        if isinstance(event, Read):
            read = event
        elif isinstance(event, Update):
            reply = replies.setdefault(
                event.index, {"text": "", "scores": [], "tokens": 0, "end": None}
            )
            assert reply["end"] is None
            reply["text"] += event.text
            reply["tokens"], reply["end"] = event.tokens, event.finish_reason
            reply["scores"] += event.scores
    return read, [replies[i] for i in sorted(replies)]


def wait_until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)
