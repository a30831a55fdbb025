"""Configuration of the language model."""

from __future__ import annotations

import difflib
import logging
import math
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig

from ..nn.norms import NORMS
from ..ops.checks import ACTIVATIONS
from ..ops.feature_maps import LEARNED, NAMES
from .adapters import register_targets
from .folder import auto_map, write_card, write_module

MIXERS = (
    "softmax",
    "sliding_window",
    "linear",
    "taylor",
    "short_convolution",
    "flash",
    "gau",
    "elita",
)
FEED_FORWARDS = ("swiglu", "gelu", "elita", "none")
POSITIONS = ("none", "scaled_sinusoidal")
LOOK_BACK = (
    "sliding_window",
    "short_convolution",
    "elita",
)  # mixers with no form in both directions
# what transformers' configurations take besides their fields
COMMON = (
    *(
        "num_labels",
        "torch_dtype",
        "output_attentions",
        "attn_implementation",
        "name_or_path",
        "auto_map",
        "model_type",
    ),
    *("quantization_config", "tokenizer_class", "classifier_dropout", "token_classification_bias"),
    *("task_specific_params", "finetuning_task", "transformers_weights", "tie_last_hidden_states"),
    *("experts_implementation", "_name_or_path", "_commit_hash", "_attn_implementation"),
)
# other models' names of fields
SYNONYMS = {
    **dict.fromkeys(("d_model", "n_embd", "dim", "width"), "hidden_size"),
    **dict.fromkeys(("n_layer", "n_layers", "num_layers", "depth"), "num_hidden_layers"),
    **dict.fromkeys(("n_head", "n_heads", "num_heads", "heads"), "num_attention_heads"),
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"), "norm_eps"),
    **dict.fromkeys(("hidden_act", "activation_function"), "feed_forward"),
    **dict.fromkeys(("attention_dropout", "hidden_dropout", "resid_pdrop"), "dropout"),
    **{
        "rope_theta": "rotary_base",
        "n_inner": "intermediate_size",
        "n_positions": "max_position_embeddings",
    },
}


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
        head_dim: head dim of softmax, sliding-window and linear mixers, and value dim of all; by
            default D / H.
        taylor_head_dim: query/key head dim K of Taylor mixers.
        taylor_order: order of Taylor mixers.
        taylor_alpha: their scores are divided by ``taylor_alpha · sqrt(K)``; by default 3 with
            `qk_norm`, else 1.
        taylor_constant_term: keep their term of degree 0.
        qk_norm: LayerNorm without parameters on queries and keys of linear and Taylor mixers.
        feature_map: feature map of linear mixers, by name: "elu", "relu", "softmax", "identity",
            "hedgehog", "rebased".
        sliding_window: tokens seen by sliding-window mixers, the token itself included.
        conv_size: taps of the short convolution over q, k, v in linear and Taylor mixers (0: none),
            and of short-convolution mixers (where 0 means 4).
        token_shift: shift half of the channels by a token in linear, Taylor and FLASH mixers.
        gate_values: sigmoid gate a head in linear and Taylor mixers.
        rotary: rotate queries and keys by position in all attention mixers ("flash": at most 32
            dims of them).
        rotary_base: see `cumulant.nn.RotaryEmbedding`.
        group_size: tokens in a group of FLASH mixers.
        query_key_dim: query/key dim of FLASH and GAU mixers.
        expansion_factor: their value dim over D.
        gated_activation: their kernel, "relu2" or "laplace".
        gated_dropout: dropout of their quadratic weights.
        length_scale: divisor of GAU's scores; by default the number of tokens seen.
        reduce_group_non_causal_attn: see `cumulant.nn.MixedChunkAttention`.
        count_padding: as FLASH-pytorch does with masked tokens in FLASH and GAU mixers.
        position_features: sines in each position logit of ELiTA mixers.
        horizon: length over which their positions run from 0 to `horizon_time`; see
            `cumulant.nn.SinusoidalLogits`.
        horizon_time: position logits' time at the horizon.
        query_logit: a logit of each query's content in ELiTA mixers (k₃).
        feed_forward: "swiglu", "gelu", "elita" (bilinear) or "none".
        intermediate_size: hidden dim of the feed-forward; by default about 8/3 D (swiglu), 4 D
            (gelu) or D (elita).
        feed_forward_factor: channels of the second projection of ELiTA's feed-forward.
        wraps: run the stack so many times over, with tied weights and a learned bias before each
            time.
        logit_ffn: width of a feed-forward over the logits, added to them; None: none.
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
        max_position_embeddings: the longest text that clients should ask for. No model has such a
            limit; programs that cut texts to it (lm-eval, servers) want a number, and the default
            is 2^20.
        use_cache: return the cache by default.
        preset: the preset this configuration came from, for the record.
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
        self._validate_types()
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
        unknown = [name for name in kwargs if name not in COMMON]
        if unknown:
            raise ValueError(_not_a_field(unknown[0]))
        self.auto_map = auto_map(kwargs.pop("auto_map", None))
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers', from what ``config.json`` holds. Keys that this version does not know,
        such as those of a later one, are kept as attributes, and said."""
        known = {*cls.__dataclass_fields__, *COMMON}
        generation = (
            GenerationConfig().to_dict()
        )  # which files of older versions hold, and transformers leaves out
        unknown = {
            name: value for name, value in config_dict.items() if name not in {*known, *generation}
        }
        if unknown:
            log = logging.getLogger(__name__)
            log.warning(
                "config.json: kept without effect, as this version does not know it: %s",
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
        # PEFT calls this just before it looks our modules up, whichever was imported first
        register_targets()
        fields: dict[str, Any] = super().to_dict()
        return fields

    def save_pretrained(
        self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """``config.json``, with the module by which programs that never imported Cumulant load the
        model, and, beside a model, a README that says how, unless there is one."""
        folder = Path(save_directory)
        if not folder.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            write_module(folder)
            if self.architectures:
                write_card(folder, self.architectures[0], self.preset)
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Nothing to do: every saved folder is loadable so already. Subclasses outside of Cumulant
        are registered.
        """
        if not cls.__module__.startswith("cumulant."):
            super().register_for_auto_class(auto_class)

    def validate(self) -> None:
        """Raise a ValueError naming the field that cannot be. In place of the base class's checks,
        which know only transformers' own layer types."""
        self._validate_types()
        unknown = [name for name in self.mixers or () if name not in MIXERS]
        if unknown or not self.mixers:
            raise ValueError(
                f"mixers: expected a list of {', '.join(MIXERS)}, got {unknown or self.mixers}"
            )
        choices = {
            "feed_forward": FEED_FORWARDS,
            "position_embedding": POSITIONS,
            "norm": NORMS,
            "final_norm": NORMS,
            "gated_activation": ACTIVATIONS,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name}: expected one of {', '.join(allowed)}, got {getattr(self, name)!r}"
                )
        self._validate_encoder()
        sizes = (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "sliding_window",
        )
        counts = (
            "group_size",
            "query_key_dim",
            "position_features",
            "horizon",
            "feed_forward_factor",
            "wraps",
        )
        for name in (*sizes, *counts, "max_position_embeddings"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.head_dim is None and not set(self.mixers) <= {"flash", "gau"}:
            raise ValueError(
                f"num_attention_heads: {self.num_attention_heads} must divide"
                f" hidden_size={self.hidden_size}, or head_dim must be given"
            )
        if self.num_attention_heads % (self.num_key_value_heads or 1):
            raise ValueError(
                f"num_key_value_heads: {self.num_key_value_heads} must divide num_attention_heads="
                f"{self.num_attention_heads}"
            )
        if self.feature_map not in (*NAMES, *LEARNED):
            raise ValueError(
                f"feature_map: expected one of {', '.join((*NAMES, *LEARNED))}, got"
                f" {self.feature_map!r}"
            )
        self._validate_numbers()

    def _validate_numbers(self) -> None:
        if self.position_embedding != "none" and self.hidden_size % 2:
            raise ValueError(
                "hidden_size: sinusoidal positions need an even number of channels, got"
                f" {self.hidden_size}"
            )
        if self.length_scale is not None and not 0 < self.length_scale < math.inf:
            raise ValueError(f"length_scale: expected a positive number, got {self.length_scale}")
        if not math.isfinite(self.horizon_time):
            raise ValueError(f"horizon_time: expected a finite number, got {self.horizon_time}")
        if self.logit_ffn is not None and self.logit_ffn < 1:
            raise ValueError(
                f"logit_ffn: expected a width of at least 1, or None for none, got {self.logit_ffn}"
            )
        if not self.norm_affine and "scalenorm" in (self.norm, self.final_norm):
            raise ValueError(
                "norm_affine: a scalenorm is its learned scale; choose layernorm or rmsnorm"
            )
        if self.taylor_order < 1:
            raise ValueError(f"taylor_order: expected at least 1, got {self.taylor_order}")
        if self.taylor_alpha is not None and not 0 < self.taylor_alpha < math.inf:
            raise ValueError(f"taylor_alpha: expected a positive number, got {self.taylor_alpha}")
        for name in ("dropout", "gated_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"{name}: expected a probability below 1, got {getattr(self, name)}"
                )

    def _validate_types(self) -> None:
        """Every field of the type that it is declared with."""
        kinds = {
            "int": (int,),
            "float": (int, float),
            "bool": (bool,),
            "str": (str,),
            "None": (type(None),),
        }
        for name, declared in type(self).__annotations__.items():
            value = getattr(self, name, None)
            if name not in CumulantConfig.__dataclass_fields__ or name.endswith("_token_id"):
                continue
            for part in str(declared).split(" | "):
                if isinstance(value, kinds.get(part, (list,))) and (part == "bool") == isinstance(
                    value, bool
                ):
                    break
            else:
                raise ValueError(f"{name}: expected {declared}, got {value!r}")

    def _validate_encoder(self) -> None:
        back = [name for name in self.mixers or () if name in LOOK_BACK]
        if self.is_causal or not (back or self.conv_size):
            return
        what = f"mixers: {back[0]}" if back else f"conv_size: {self.conv_size}"
        raise ValueError(f"{what} looks backwards only; an encoder (is_causal=False) needs others")

    def mixer(self, layer: int) -> str:
        """The mixer of a layer: the pattern repeats over the depth."""
        assert self.mixers is not None
        return self.mixers[layer % len(self.mixers)]

    @property
    def counts_positions(self) -> bool:
        """Whether a text's place in its row would show: positions from 0 in each text, not only
        their distances.
        """
        return self.position_embedding != "none" or "elita" in (self.mixers or ())

    @property
    def final_logit_softcapping(self) -> None:
        """None. Programs read it before they multiply hidden states by the logits' matrix
        themselves (TRL does), which would leave out a feed-forward over the logits: with one,
        reading it is an error."""
        if self.logit_ffn is not None:
            raise ValueError(
                "logit_ffn: this program forms the logits itself, without the feed-forward over"
                " them; use transformers' Trainer, or a model without logit_ffn"
            )

    @property
    def layer_types(self) -> list[str]:
        """Kinds of cache layer, by which `transformers.DynamicCache(config=...)` builds the cache:
        each layer has one for each time that the stack is run."""
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
        """This configuration for each entry of `layer_types`; transformers' own stops after
        `num_hidden_layers`.
        """
        return [self] * len(self.layer_types)


def _not_a_field(name: str) -> str:
    """What is wrong with a name, and the likely fix."""
    if name in GenerationConfig().to_dict():
        return (
            f"{name}: not a field of CumulantConfig; it belongs to generate() or"
            " model.generation_config"
        )
    near = difflib.get_close_matches(name, CumulantConfig.__dataclass_fields__, 1)
    likely = SYNONYMS.get(name) or (near[0] if near else None)
    return f"{name}: not a field of CumulantConfig" + (
        f"; did you mean {likely}?" if likely else ""
    )
