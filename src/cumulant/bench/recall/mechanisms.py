"""The mechanisms of the recall test, and the models that they are tested in.

A new mechanism is one entry of `_MECHANISMS`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ...models import CumulantForCausalLM, from_preset
from ...nn import ShortConvolution
from ..reports import palette
from ..reports.palette import Style, by_name
from .task import Task


@dataclass(frozen=True)
class Mechanism:
    """A mechanism of the recall test.

    name, style: in tables and pictures. mixer: of both layers. fields: of the configuration.
    window: tokens of a sliding window, in a third layer.
    head_dim: numbers in a head, of which there are then as many as the width has room for; by
        default there is one head.
    """

    name: str
    style: Style
    mixer: str
    fields: dict[str, Any] = field(default_factory=dict)
    window: int | None = None
    head_dim: int | None = None


# taylor-K, rebased-K: queries and keys of K numbers; window-W: softmax over the last W tokens;
# gated-, mamba2-: with a decay of each token
_MECHANISMS = (
    Mechanism("softmax", palette.BLACK, "softmax"),
    Mechanism("window-16", palette.GREY, "sliding_window", {"sliding_window": 16}),
    Mechanism("window-64", palette.SLATE, "sliding_window", {"sliding_window": 64}),
    Mechanism("linear", palette.ORANGE, "linear"),
    Mechanism("taylor-8", palette.SKY, "taylor", {"taylor_head_dim": 8}),
    Mechanism("taylor-16", palette.BLUE, "taylor", {"taylor_head_dim": 16}),
    Mechanism("taylor-24", palette.NAVY, "taylor", {"taylor_head_dim": 24}),
    Mechanism("gated-linear", palette.ORANGE.variant(2), "linear", {"decay": "gated"}),
    Mechanism(
        "gated-taylor-8",
        palette.SKY.variant(2),
        "taylor",
        {"taylor_head_dim": 8, "decay": "gated"},
    ),
    Mechanism(
        "gated-taylor-16",
        palette.BLUE.variant(2),
        "taylor",
        {"taylor_head_dim": 16, "decay": "gated"},
    ),
    Mechanism(
        "mamba2-taylor-16",
        palette.PINK.variant(2),
        "taylor",
        {"taylor_head_dim": 16, "decay": "mamba2"},
    ),
    Mechanism("higher_order", palette.BROWN, "taylor", {"taylor_head_dim": 16, "qk_norm": True}),
    Mechanism("rebased-16", palette.PURPLE, "linear", {"feature_map": "rebased"}, head_dim=16),
    Mechanism("based", palette.VERMILION, "taylor", {"taylor_head_dim": 16}, window=16),
    Mechanism(
        "flash",
        palette.GREEN,
        "flash",
        {"group_size": 32, "query_key_dim": 32, "expansion_factor": 1.0},
    ),
    Mechanism("elita", palette.PINK, "elita"),
)
MECHANISMS = by_name(_MECHANISMS)
STYLES = {name: mechanism.style for name, mechanism in MECHANISMS.items()}


@dataclass(frozen=True)
class Setting:
    """One model and its training.

    mechanism: a name of `MECHANISMS`.
    conv: the first of its two layers is a short convolution instead of the mechanism.
    learning_rate: of AdamW with weight decay 0.1, falling to 0 along a cosine.
    steps: of `batch` sequences.
    """

    task: Task
    mechanism: str
    conv: bool
    width: int
    learning_rate: float
    seed: int
    steps: int
    batch: int = 32


def build_model(setting: Setting) -> CumulantForCausalLM:
    """A model of two layers with one head and no feed-forwards.

    based has a third layer, its sliding window. rebased-16 has heads of 16 numbers: one head would
    have states of megabytes, since its values are as wide as its queries.
    """
    mechanism = MECHANISMS[setting.mechanism]
    fields, mixers = dict(mechanism.fields), [mechanism.mixer, mechanism.mixer]
    if setting.conv:
        mixers[0] = "short_convolution"
    if mechanism.window is not None:
        mixers.append("sliding_window")
        fields["sliding_window"] = mechanism.window
    config = from_preset(
        "taylor",
        conv_size=0,
        vocab_size=setting.task.vocabulary,
        hidden_size=setting.width,
        num_hidden_layers=len(mixers),
        num_attention_heads=max(setting.width // mechanism.head_dim, 1)
        if mechanism.head_dim
        else 1,
        head_dim=mechanism.head_dim,
        feed_forward="none",
        rotary=not setting.conv,
        horizon=setting.task.length,
        initializer_range=setting.width**-0.5,  # at the usual 0.02 products of projections vanish
        mixers=mixers,
        **fields,
    )
    model = CumulantForCausalLM(config)
    for module in model.modules():
        if isinstance(module, ShortConvolution):  # as in Zoology, instead of the identity
            nn.init.uniform_(module.weight, -(module.size**-0.5), module.size**-0.5)
    return model
