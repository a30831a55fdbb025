"""The language model: embedding, depth × (mixer, feed-forward), norm, logits, as a Hugging Face model."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from ..nn import (
    OffsetScale,
    Projection,
    ScaledSinusoidalEmbedding,
    ScaleNorm,
    ShortConvolution,
    SinusoidalLogits,
)
from ..nn.feature_maps import LearnedFeatureMap
from ..nn.norms import make_norm
from ..nn.padding import offsets
from ..nn.step import Layer, step, step_mixer, steppable
from ..ops.step import Vector
from .cache import read_state, write_state
from .config import CumulantConfig
from .feed_forward import LogitFeedForward, build_feed_forward
from .mixers import build_mixer


@steppable
class CumulantBlock(GradientCheckpointingLayer):  # type: ignore[misc]
    """``x + mixer(norm(x))``, then ``x + feed_forward(norm(x))`` if there is one."""

    def __init__(self, config: CumulantConfig, layer: int):
        super().__init__()
        self.mixer_norm = make_norm(config.norm, config.hidden_size, config.norm_eps, affine=config.norm_affine)
        self.mixer = build_mixer(config, layer)
        self.dropout = nn.Dropout(config.dropout)
        projections: list[Any] = [self.mixer.out_proj]
        self.feed_forward = build_feed_forward(config)
        if self.feed_forward is not None:
            self.feed_forward_norm = make_norm(
                config.norm, config.hidden_size, config.norm_eps, affine=config.norm_affine
            )
            projections.append(self.feed_forward.out_proj)
        for projection in projections:
            projection.writes_residual = True

    def forward(
        self,
        x: Tensor,
        key_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        past_key_values: Cache | None = None,
        past_mask: Tensor | None = None,
        length: int = 0,
        slot: int = 0,
    ) -> Tensor:
        """`slot`: the mixer's entry of the cache."""
        state: Any = None if past_key_values is None else read_state(past_key_values, slot, past_mask)
        if state is not None and key_mask is None and hasattr(self.mixer, "parts"):
            stepped = step_mixer(self.mixer, x, state, self)
            if stepped is not None:
                write_state(past_key_values, slot, stepped[1], length)
                return stepped[0]
        h = self.mixer_norm(x)
        if past_key_values is None:
            h = self.mixer(h, key_mask=key_mask, cu_seqlens=cu_seqlens)
        else:
            h, state = self.mixer(h, key_mask=key_mask, state=state, return_state=True)
            write_state(past_key_values, slot, state, length)
        x = x + self.dropout(h)
        if self.feed_forward is not None:
            fed = step(self, x, lay="lay_feed_forward")
            x = x + self.dropout(self.feed_forward(self.feed_forward_norm(x))) if fed is None else fed[0]
        return x

    def lay(self, layer: Layer, x: Vector, onto: Vector | None) -> Vector:
        """See `cumulant.nn.step`."""
        layer.child(self.mixer, layer.norm(self.mixer_norm, x), x)
        return self.lay_feed_forward(layer, x, onto)

    def lay_feed_forward(self, layer: Layer, x: Vector, onto: Vector | None) -> Vector:
        layer.take(self)
        layer.drop(self.dropout)
        if self.feed_forward is not None:
            layer.child(self.feed_forward, layer.norm(self.feed_forward_norm, x), x)
        return x


class CumulantPreTrainedModel(PreTrainedModel):  # type: ignore[misc]
    config_class = CumulantConfig
    config: CumulantConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    _no_split_modules = ["CumulantBlock"]  # noqa: RUF012 (the base class's convention)
    _is_stateful = True  # a fixed-size state cannot be rolled back, so no assisted generation

    def _init_weights(self, module: nn.Module) -> None:
        """Normal weights; those of projections into the residual stream smaller, as depth adds them up."""
        if getattr(module, "writes_residual", False):
            std = self.config.initializer_range / math.sqrt(2 * self.config.num_hidden_layers * self.config.wraps)
            init.normal_(module.weight, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
            return
        super()._init_weights(module)
        if getattr(module, "starts_at_zero", False):
            init.zeros_(module.weight)
        elif isinstance(module, ShortConvolution):
            init.copy_(module.weight, module.initial_weight(module.weight))
        elif isinstance(module, (LearnedFeatureMap, SinusoidalLogits)):
            for name, value in module.initial().items():
                init.copy_(getattr(module, name), value)
        elif isinstance(module, OffsetScale):
            init.normal_(module.gamma, std=0.02)
            init.zeros_(module.beta)
        elif isinstance(module, ScaleNorm):
            init.ones_(module.weight)
        elif isinstance(module, ScaledSinusoidalEmbedding):
            init.copy_(module.scale, module.initial_scale())


class CumulantModel(CumulantPreTrainedModel):
    """The stack without logits."""

    def __init__(self, config: CumulantConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(CumulantBlock(config, i) for i in range(config.num_hidden_layers))
        self.norm = make_norm(
            config.final_norm or config.norm, config.hidden_size, config.norm_eps, affine=config.norm_affine
        )
        self.wrap_bias: nn.Parameter | None = None
        if config.wraps > 1:
            self.wrap_bias = nn.Parameter(torch.zeros(config.wraps, config.hidden_size))
        self.position: ScaledSinusoidalEmbedding | None = None
        if config.position_embedding == "scaled_sinusoidal":
            self.position = ScaledSinusoidalEmbedding(config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.post_init()

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> BaseModelOutputWithPast:
        """See `CumulantForCausalLM.forward`."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids: pass either input_ids [B, T] or inputs_embeds [B, T, D]")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = self.config.use_cache and not self.training if use_cache is None else use_cache
        if not self.config.is_causal:
            use_cache = False
        if cu_seqlens is not None or (self.training and self.layers[0].gradient_checkpointing):
            use_cache = False
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        key_mask, past_mask = _split_mask(attention_mask, x, past)
        if self.position is not None:
            place = _places(x, past, key_mask, past_mask, cu_seqlens, self.config.count_padding)
            x = x + self.position(place).to(x.dtype)
        x = self.dropout(x)
        hidden = []
        for wrap in range(self.config.wraps):
            if self.wrap_bias is not None:
                x = x + self.wrap_bias[wrap].to(x.dtype)
            for layer, block in enumerate(self.layers):
                if output_hidden_states:
                    hidden.append(x)
                x = block(
                    x,
                    key_mask=key_mask,
                    cu_seqlens=cu_seqlens,
                    past_key_values=past_key_values,
                    past_mask=past_mask,
                    length=past + x.shape[1],
                    slot=wrap * len(self.layers) + layer,
                )
        x = self.norm(x)
        hidden.append(x)
        return BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=tuple(hidden) if output_hidden_states else None,
        )


def _split_mask(attention_mask: Tensor | None, x: Tensor, past: int) -> tuple[Tensor | None, Tensor | None]:
    """Masks of the new tokens ``[B, T]`` and of the cached ones ``[B, S]``; None where all positions are tokens."""
    if attention_mask is None:
        return None, None
    B, T = x.shape[:2]
    if attention_mask.dim() != 2 or attention_mask.shape[0] != B or attention_mask.shape[1] != past + T:
        raise ValueError(
            f"attention_mask: expected [B, S + T] = [{B}, {past + T}], {past} cached positions and {T} new ones, "
            f"got {list(attention_mask.shape)}"
        )
    mask = attention_mask.bool()
    if not torch.compiler.is_compiling() and bool(mask.all()):
        return None, None
    key_mask, past_mask = mask[:, mask.shape[1] - T :], mask[:, : mask.shape[1] - T]
    if not torch.compiler.is_compiling() and bool(key_mask.all()):
        return None, past_mask if past_mask.shape[1] else None
    return key_mask, past_mask if past_mask.shape[1] else None


def _places(
    x: Tensor,
    past: int,
    key_mask: Tensor | None,
    past_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    count_padding: bool,
) -> Tensor:
    """Place of each new token in its text, ``[T]`` or ``[B, T]``: padding takes none, unless it counts."""
    T = x.shape[1]
    if cu_seqlens is not None:
        return offsets(T, cu_seqlens)
    place = torch.arange(T, device=x.device) if key_mask is None or count_padding else key_mask.cumsum(1) - 1
    if past_mask is None or count_padding:
        return place + past
    return place + past_mask.sum(1, keepdim=True)


class CumulantWithLogits(CumulantPreTrainedModel):
    """The stack and its logits; embedding and logits share their matrix unless the configuration says otherwise."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 (the base class's convention)

    def __init__(self, config: CumulantConfig):
        super().__init__(config)
        self.model = CumulantModel(config)
        self.lm_head = Projection(config.hidden_size, config.vocab_size, bias=config.logits_bias)
        if config.tie_word_embeddings:
            self._keys_to_ignore_on_save = ["lm_head.weight"]
        self.logit_ffn = None if config.logit_ffn is None else LogitFeedForward(config.vocab_size, config.logit_ffn)
        self.post_init()

    def logits(self, hidden: Tensor) -> Tensor:
        """``[..., D]`` -> ``[..., vocab_size]``."""
        logits: Tensor = self.lm_head(hidden)
        return logits if self.logit_ffn is None else self.logit_ffn(logits)


class CumulantForCausalLM(CumulantWithLogits, GenerationMixin):  # type: ignore[misc]
    """The language model; `generate`, `save_pretrained`, `Trainer`, `AutoModelForCausalLM` work as with any other."""

    def __init__(self, config: CumulantConfig):
        if not config.is_causal:
            raise ValueError("is_causal: a causal language model cannot see later tokens; use CumulantForMaskedLM")
        super().__init__(config)

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None = None, **_: Any) -> Tensor | None:
        """Masks stay ``[B, S]``: mixers take them as they are."""
        return attention_mask

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        cu_seqlens: Tensor | None = None,
        logits_to_keep: int = 0,
        num_items_in_batch: Tensor | int | None = None,
        shift_labels: Tensor | None = None,
    ) -> CausalLMOutputWithPast:
        """Logits ``[B, T, vocab_size]``, and the mean cross entropy in nats if `labels` are given.

        Args:
            input_ids: ``[B, T]``; with a cache, any number of new tokens.
            attention_mask: ``[B, T]``, with a cache ``[B, S + T]``; 0 marks padding, on either side. None: no padding,
                in the cache neither.
            past_key_values: cache of earlier tokens, from a call with ``use_cache=True`` or
                ``transformers.DynamicCache(config=model.config)``.
            inputs_embeds: ``[B, T, D]`` in place of `input_ids`.
            labels: ``[B, T]``, as `input_ids`; -100 is left out. Shifted here.
            use_cache: return the cache; by default when not training.
            output_hidden_states: return the residual stream after the embedding and after each run of a block.
            cu_seqlens: ``[N + 1]`` offsets of documents packed end to end in one row (B = 1); none sees another.
            logits_to_keep: compute only the last so many logits; 0 for all.
            num_items_in_batch: divisor of the summed loss, for gradient accumulation.
            shift_labels: ``[B, T]``, `labels` already shifted: ``shift_labels[t]`` follows ``input_ids[t]``.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            cu_seqlens=cu_seqlens,
        )
        hidden = outputs.last_hidden_state
        logits = self.logits(hidden[:, -logits_to_keep:] if logits_to_keep else hidden)
        loss = None
        if labels is not None or shift_labels is not None:
            loss = self.loss_function(
                logits,
                labels,
                self.config.vocab_size,
                num_items_in_batch=num_items_in_batch,
                shift_labels=None if shift_labels is None else shift_labels.contiguous(),
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )
