"""Tiny models of every kind, and models of transformers to compare them with."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cumulant.models import PRESETS, CumulantForCausalLM, from_preset
from cumulant.text.tokenizer import byte_tokenizer

KINDS = [*PRESETS, "gau", "wrapped"]
PEERS = ["llama", *KINDS]
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 257}
SPECIAL = {"bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 256}


def config(kind, **fields):
    fields = {**SIZES, **SPECIAL, "initializer_range": 0.3, **fields}
    if kind == "llama":
        return LlamaConfig(**{"intermediate_size": 64, **fields})
    if kind.endswith("based"):
        fields["num_hidden_layers"] = 3
    small = {"group_size": 6, "query_key_dim": 12, "taylor_head_dim": 8, "sliding_window": 5}
    own = {"gau": {"mixers": ["gau", "flash"]}, "wrapped": {"wraps": 2}}.get(kind, {})
    preset = {"gau": "flash", "wrapped": "taylor"}.get(kind, kind)
    return from_preset(preset, **{**small, **own, **fields})


def build(kind, *, seed=0, **fields):
    """A tiny causal language model, random, in evaluation mode."""
    torch.manual_seed(seed)
    cls = LlamaForCausalLM if kind == "llama" else CumulantForCausalLM
    return cls(config(kind, **fields)).eval()


def tokens(*shape, seed=1, high=256):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def checkpoint(model):
    """Activation checkpointing, under the name that this version of transformers has for it."""
    new = "activation_checkpointing_enable"
    getattr(model, new if hasattr(model, new) else "gradient_checkpointing_enable")()


TOKENIZER = byte_tokenizer()
