"""Configuration of the language model."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig

from .adapters import register_targets
from .config_names import COMMON, check_names
from .config_values import check_types, check_values
from .folder import auto_map, write_card, write_module


class CumulantConfig(PreTrainedConfig):  # type: ignore[misc]
    """Configuration of `CumulantForCausalLM`, checked on construction.

    Args:
        vocab_size: tokens in the vocabulary.
        hidden_size: model dim D.
        num_hidden_layers: depth.
        mixers: pattern of token mixers, repeated over the depth: "softmax", "sliding_window",
            "linear", "taylor", "short_convolution", "flash" (mixed chunk attention), "gau" (gated
            attention unit), "elita".
        is_causal: False for an encoder, `CumulantForMaskedLM`: every token sees all.
        num_attention_heads: query heads H of every attention mixer.
        num_key_value_heads: key/value heads G, dividing H; by default H.
        head_dim: head dim of softmax, sliding-window and linear mixers, and value dim of all, by
            default D / H.
        taylor_head_dim: query/key head dim K of Taylor mixers.
        taylor_order: order of Taylor mixers.
        taylor_alpha: Taylor mixers divide scores by ``taylor_alpha · sqrt(K)``; by default 3 with
            `qk_norm`, else 1.
        taylor_constant_term: keep the term of degree 0 in Taylor mixers.
        qk_norm: LayerNorm without parameters on queries and keys of linear and Taylor mixers.
        feature_map: feature map of linear mixers, by name: "elu", "relu", "softmax", "identity",
            "hedgehog", "rebased".
        sliding_window: tokens seen by sliding-window mixers, the token itself included.
        conv_size: taps of the short convolution over q, k, v in linear and Taylor mixers (0: none),
            and of short-convolution mixers (0: 4 taps).
        token_shift: shift half of the channels by a token in linear, Taylor and FLASH mixers.
        gate_values: a sigmoid gate for each head of linear and Taylor mixers.
        decay: how the weights of earlier tokens decay in linear and Taylor mixers: "none", "fixed"
            (`cumulant.nn.FixedDecay`), "gated" (`GatedDecay`) or "mamba2" (`Mamba2Decay`).
        decay_spans: the span of each key/value head in tokens, fixed or at the start of training;
            by default those of these modules.
        decay_divisor: divisor of the logarithms of gated decays.
        rotary: rotate queries and keys by position in all attention mixers, in "flash" and "gau" at
            most 32 of their dims.
        rotary_base: see `cumulant.nn.RotaryEmbedding`.
        group_size: tokens in a group of FLASH mixers.
        query_key_dim: query/key dim of FLASH and GAU mixers.
        expansion_factor: value dim of FLASH and GAU mixers over D.
        gated_activation: activation of their scores, "relu2" or "laplace".
        gated_dropout: dropout of their quadratic weights.
        length_scale: divisor of the scores of GAU mixers; by default the number of tokens seen.
        reduce_group_non_causal_attn: see `cumulant.nn.MixedChunkAttention`.
        count_padding: count masked tokens in FLASH and GAU mixers, as FLASH-pytorch does.
        position_features: sines in each position logit of ELiTA mixers.
        horizon: length over which their positions run from 0 to `horizon_time`; see
            `cumulant.nn.SinusoidalLogits`.
        horizon_time: the time τ of position logits at the horizon.
        query_logit: use k₃ in ELiTA mixers, a logit of each query's content.
        feed_forward: "swiglu", "gelu", "elita" (bilinear) or "none".
        intermediate_size: hidden dim of the feed-forward; by default about 8/3 D (swiglu), 4 D
            (gelu) or D (elita).
        feed_forward_factor: channels of the second projection of ELiTA's feed-forward.
        wraps: number of runs of the stack, with tied weights and a learned bias before each run.
        logit_ffn: width of a feed-forward over the logits, which is added to them; None: none.
        position_embedding: absolute positions added to the embedding: "none" or
            "scaled_sinusoidal".
        norm: norm before each mixer and feed-forward: "rmsnorm", "layernorm" or "scalenorm".
        final_norm: norm before the logits; by default as `norm`.
        norm_affine: learned scales (and offsets) in the norms before mixers, feed-forwards and
            logits.
        norm_eps: epsilon of the norms.
        logits_bias: a bias on the logits.
        dropout: dropout of the mixers' and feed-forwards' outputs.
        initializer_range: deviation of the initial weights; projections into the residual stream
            get it divided by sqrt(2 · depth).
        max_position_embeddings: length to which clients such as lm-eval cut texts, by default 2^20.
            The models themselves have no limit.
        use_cache: return the cache by default.
        preset: the name of the preset that this configuration was made from.
    """

    model_type = "cumulant"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (the base class's convention)

    vocab_size: int = 256
    hidden_size: int = 256
    num_hidden_layers: int = 4
    mixers: list[str] | None = None
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    taylor_head_dim: int = 16
    taylor_order: int = 2
    taylor_alpha: float | None = None
    taylor_constant_term: bool = True
    qk_norm: bool = False
    feature_map: str = "elu"
    sliding_window: int = 64
    conv_size: int = 0
    token_shift: bool = False
    gate_values: bool = False
    decay: str = "none"
    decay_spans: list[float] | None = None
    decay_divisor: float = 1.0
    rotary: bool = True
    rotary_base: float = 10000.0
    is_causal: bool = True
    group_size: int = 256
    query_key_dim: int = 128
    expansion_factor: float = 2.0
    gated_activation: str = "relu2"
    gated_dropout: float = 0.0
    length_scale: float | None = None
    reduce_group_non_causal_attn: bool = True
    count_padding: bool = False
    position_embedding: str = "none"
    norm: str = "rmsnorm"
    final_norm: str | None = None
    logits_bias: bool = False
    position_features: int = 16
    horizon: int = 1024
    horizon_time: float = 1.0
    query_logit: bool = True
    feed_forward: str = "swiglu"
    intermediate_size: int | None = None
    feed_forward_factor: int = 8
    wraps: int = 1
    logit_ffn: int | None = None
    norm_affine: bool = True
    norm_eps: float = 1e-6
    dropout: float = 0.0
    initializer_range: float = 0.02
    max_position_embeddings: int = 2**20
    use_cache: bool = True
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    preset: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.mixers is None:
            self.mixers = ["taylor"]
        self.mixers = list(self.mixers)
        if isinstance(self.decay_spans, tuple):
            self.decay_spans = list(self.decay_spans)
        check_types(self, CumulantConfig.__dataclass_fields__)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if (
            self.head_dim is None
            and self.num_attention_heads > 0
            and self.hidden_size % self.num_attention_heads == 0
        ):
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.final_norm is None:
            self.final_norm = self.norm
        if self.intermediate_size is None:
            widths = {"gelu": 4 * self.hidden_size, "elita": self.hidden_size}
            width = widths.get(self.feed_forward, 8 * self.hidden_size // 3)
            self.intermediate_size = width if self.feed_forward == "elita" else -(-width // 32) * 32
        self.validate()
        check_names(kwargs, CumulantConfig.__dataclass_fields__)
        self.auto_map = auto_map(kwargs.pop("auto_map", None))
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The configuration from the contents of ``config.json``.

        Keys that this version does not know, such as those of a later one, become attributes, and a
        warning names them.
        """
        known = {*cls.__dataclass_fields__, *COMMON}
        # files of older versions hold these too, and transformers ignores them
        generation = GenerationConfig().to_dict()
        unknown = {
            name: value for name, value in config_dict.items() if name not in {*known, *generation}
        }
        if unknown:
            log = logging.getLogger(__name__)
            log.warning(
                "config.json: this version does not know, and keeps without effect: %s",
                ", ".join(unknown),
            )
        made = super().from_dict({k: v for k, v in config_dict.items() if k in known}, **kwargs)
        config = made[0] if isinstance(made, tuple) else made
        for name, value in unknown.items():
            if not hasattr(type(config), name):  # properties are computed
                setattr(config, name, value)
        return made

    def to_dict(self) -> dict[str, Any]:
        """All fields and further attributes."""
        # PEFT calls this just before it looks up our modules, whichever was imported first
        register_targets()
        fields: dict[str, Any] = super().to_dict()
        return fields

    def save_pretrained(
        self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Write ``config.json`` and the module by which programs without Cumulant load the model.

        Beside a model, also write a README that says how to load it, unless there is one.
        """
        folder = Path(save_directory)
        if not folder.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            write_module(folder)
            if self.architectures:
                write_card(folder, self.architectures[0], self.preset)
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Register subclasses outside of Cumulant. Its own classes need no registration."""
        if not cls.__module__.startswith("cumulant."):
            super().register_for_auto_class(auto_class)

    def validate(self) -> None:
        """Raise a ValueError that names the first field with a wrong value.

        It replaces the base class's checks, which know only transformers' own layer types.
        """
        check_types(self, CumulantConfig.__dataclass_fields__)
        check_values(self)

    def mixer(self, layer: int) -> str:
        """The mixer of a layer: the pattern repeats over the depth."""
        assert self.mixers is not None
        return self.mixers[layer % len(self.mixers)]

    @property
    def counts_positions(self) -> bool:
        """Whether outputs depend on positions counted from 0, not only on distances."""
        return self.position_embedding != "none" or "elita" in (self.mixers or ())

    @property
    def final_logit_softcapping(self) -> None:
        """None, or an error for a model with a feed-forward over the logits.

        Programs such as TRL read it before they multiply hidden states by the logits' matrix
        themselves, which would leave that feed-forward out.
        """
        if self.logit_ffn is not None:
            raise ValueError(
                "logit_ffn: this program forms the logits itself, without the feed-forward over"
                " them; use transformers' Trainer, or a model without logit_ffn"
            )

    @property
    def layer_types(self) -> list[str]:
        """The type of each cache layer, for `transformers.DynamicCache(config=...)`.

        Each layer of the model has one for each run of the stack.
        """
        growing = ("softmax", "gau")
        once = [
            "full_attention" if self.mixer(i) in growing else "cumulant_state"
            for i in range(self.num_hidden_layers)
        ]
        return once * self.wraps

    @layer_types.setter
    def layer_types(self, value: list[str]) -> None:
        if list(value) != self.layer_types:
            raise ValueError(
                f"layer_types: follows from mixers, and is {self.layer_types}; set mixers instead"
            )

    @property
    def per_layer_config(self) -> list[CumulantConfig]:
        """This configuration, once for each entry of `layer_types`, which may repeat layers."""
        return [self] * len(self.layer_types)
