"""Small language models and token ids that the tests of models and clients share."""

import torch
from transformers import set_seed

from cumulant.models import (
    CumulantForCausalLM,
    from_preset,
)


def build(preset, **overrides):
    set_seed(0)
    options = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "vocab_size": 50,
    }
    options |= {"sliding_window": 6, "group_size": 5, "query_key_dim": 12}
    options |= {"horizon": 15, "initializer_range": 0.3, "pad_token_id": 0} | overrides
    model = CumulantForCausalLM(from_preset(preset, **options)).double().eval()
    with torch.no_grad():  # what starts at or near zero
        for name, p in model.named_parameters():
            parts = ("mixer.position", "mixer.decay", "wrap_bias", "logit_ffn")
            if any(part in name for part in parts):
                p.normal_(std=0.3)
    return model


WRAPPED = {
    "mixers": ["elita", "softmax", "sliding_window", "flash", "gau", "linear", "short_convolution"],
    "num_hidden_layers": 7,
    "wraps": 3,
    "logit_ffn": 20,
    "norm": "rmsnorm",
    "norm_affine": False,
}


def tokens(*shape):
    return torch.randint(1, 50, shape, generator=torch.Generator().manual_seed(0))
