"""Exported models beside eager ones: what the tests of both kinds of export share."""

import numpy as np
import torch

from ..models.common import WRAPPED, build, tokens

PROMPT, SECOND, STEPS = 23, 9, 200  # a prompt in two pieces, then single tokens
# beside the presets: what else a configuration can ask for
OPTIONS = {
    "wrapped": ("linear", WRAPPED),
    "grouped heads": (
        "taylor",
        {"num_key_value_heads": 2, "token_shift": True, "gate_values": True, "norm": "scalenorm"},
    ),
    "grouped softmax": ("softmax", {"num_key_value_heads": 2, "feed_forward": "gelu"}),
    "own logits": ("linear", {"logits_bias": True, "tie_word_embeddings": False}),
    "tied logits with a bias": ("linear", {"logits_bias": True, "norm_affine": False}),
    "one window": ("based", {"mixers": ["sliding_window"], "num_key_value_heads": 1}),
    "window of 1": ("based", {"mixers": ["sliding_window"], "sliding_window": 1}),
    "long window": ("based", {"mixers": ["sliding_window"], "sliding_window": 300}),
    "no rotation": ("based", {"rotary": False}),
    "relu": ("linear", {"feature_map": "relu"}),
    "softmax features": ("linear", {"feature_map": "softmax", "num_key_value_heads": 2}),
    "hedgehog": ("linear", {"feature_map": "hedgehog", "num_key_value_heads": 2}),
    "fixed decay": ("linear", {"decay": "fixed", "num_key_value_heads": 2}),
    "mamba2 decay": ("taylor", {"decay": "mamba2", "num_key_value_heads": 2}),
    "divided decay": ("linear", {"decay": "gated", "decay_divisor": 16.0}),
    "order 1": ("taylor", {"taylor_order": 1, "qk_norm": True}),
    "gau": ("flash", {"mixers": ["gau"], "gated_activation": "laplace"}),
    "gau of a length": ("flash", {"mixers": ["gau"], "length_scale": 20.0, "token_shift": False}),
    "laplace": ("flash", {"gated_activation": "laplace", "rotary": False, "norm": "layernorm"}),
    "groups of 1": ("flash", {"group_size": 1}),
    "no query logit": ("elita", {"query_logit": False, "norm_affine": True}),
    "convolution of 1": ("linear", {"conv_size": 1}),
}
# Terms of these sums cancel, and eager fp32 is itself as far from fp64.
CANCELLING = {
    "identity": ("linear", {"feature_map": "identity"}),
    "rebased": ("linear", {"feature_map": "rebased"}),
    "order 4": ("taylor", {"taylor_order": 4, "taylor_head_dim": 4}),
    "order 3": ("taylor", {"taylor_order": 3, "taylor_head_dim": 6}),
    "no constant": ("taylor", {"taylor_constant_term": False, "qk_norm": True}),
}


def small(name):
    """A tiny model in fp32 of a preset, or of one of the tables above."""
    preset, options = {**OPTIONS, **CANCELLING}.get(name, (name, {}))
    return build(preset, **options).float()


def read_in_pieces(read, ids, steps):
    """The logits of a prompt in two pieces, and then token by token.

    read: ``ids [B, T]`` -> all their logits.
    """
    first = PROMPT + SECOND
    pieces = [ids[:, :PROMPT], ids[:, PROMPT:first]]
    pieces += [ids[:, t : t + 1] for t in range(first, first + steps)]
    return np.concatenate([np.asarray(read(piece)) for piece in pieces], 1)


def two_rows(steps):
    return tokens(2, PROMPT + SECOND + steps)


@torch.no_grad()
def eager_logits(model, ids):
    return model(ids, use_cache=False).logits.numpy()
