"""The language model for Hugging Face: embedding, blocks, norm and logits."""

from __future__ import annotations

import math
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from ..nn import (
    OffsetScale,
    ScaledSinusoidalEmbedding,
    ScaleNorm,
    ShortConvolution,
    SinusoidalLogits,
)
from ..nn.decay import Decay
from ..nn.feature_maps import LearnedFeatureMap
from ..nn.norms import make_norm
from ..nn.projection import is_plain, project
from .block import CumulantBlock
from .cache import prepare_cache
from .config import CumulantConfig
from .documents import Marks, find_documents, ignore_first_labels
from .feed_forward import LogitFeedForward
from .generation import CumulantGenerationMixin
from .inputs import (
    CausalArguments,
    ClientArguments,
    check_arguments,
    check_cache_position,
    check_labels,
    check_skip_logits,
    check_token_types,
    check_tokens,
    positions_in_texts,
    select_hidden_states,
    split_mask,
)
from .loss import causal_loss
from .quantization import check_trainable
from .step import step_model, stepped_as_a_whole

if TYPE_CHECKING:
    from typing_extensions import Unpack


class CumulantPreTrainedModel(PreTrainedModel):  # type: ignore[misc]
    """The base of all models: their configuration class and their initial weights."""

    config_class = CumulantConfig
    config: CumulantConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    _supports_sdpa = True  # softmax mixers always use SDPA
    _no_split_modules = ["CumulantBlock"]  # noqa: RUF012 (the base class's convention)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """Register subclasses outside of Cumulant. Its own classes need no registration."""
        if not cls.__module__.startswith("cumulant."):
            super().register_for_auto_class(auto_class)

    def _init_weights(self, module: nn.Module) -> None:
        """Draw normal weights, smaller ones for projections into the residual stream."""
        if getattr(module, "writes_residual", False):
            std = self.config.initializer_range / math.sqrt(
                2 * self.config.num_hidden_layers * self.config.wraps
            )
            init.normal_(module.weight, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
            return
        super()._init_weights(module)
        if getattr(module, "starts_at_zero", False):
            init.zeros_(module.weight)
        elif isinstance(module, ShortConvolution):
            init.copy_(module.weight, module.initial_weight(module.weight))
        elif isinstance(module, (Decay, LearnedFeatureMap, SinusoidalLogits)):
            for name, value in module.initial().items():
                init.copy_(getattr(module, name), value)
        elif isinstance(module, OffsetScale):
            init.normal_(module.gamma, std=0.02)
            init.zeros_(module.beta)
        elif isinstance(module, ScaleNorm):
            init.ones_(module.weight)
        elif isinstance(module, ScaledSinusoidalEmbedding):
            init.copy_(module.scale, module.initial_scale())


@stepped_as_a_whole
class CumulantModel(CumulantPreTrainedModel):
    """The language model without logits."""

    def __init__(self, config: CumulantConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            CumulantBlock(config, i) for i in range(config.num_hidden_layers)
        )
        self.norm = make_norm(
            config.final_norm or config.norm,
            config.hidden_size,
            config.norm_eps,
            affine=config.norm_affine,
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
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        cu_seqlens: Tensor | None = None,
        seq_idx: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        **kwargs: Unpack[ClientArguments],
    ) -> BaseModelOutputWithPast:
        """See `CumulantForCausalLM.forward`."""
        check_arguments(kwargs, self.config)
        check_trainable(self)
        check_token_types(token_type_ids)
        x = self._embed_tokens(input_ids, inputs_embeds)
        B, T = x.shape[:2]
        past = 0
        if past_key_values is not None:
            past_key_values, past = prepare_cache(past_key_values, self.config, T)
        check_cache_position(kwargs.get("cache_position"), past, T)
        key_mask, past_mask = split_mask(attention_mask, x, past)
        marks = Marks.read(
            kwargs, position_ids=position_ids, seq_idx=seq_idx, cu_seqlens=cu_seqlens
        )
        documents = find_documents(
            marks,
            B,
            T,
            key_mask,
            absolute=self.config.counts_positions,
            past=past,
            past_mask=past_mask,
        )
        cu_seqlens = None
        if documents is not None:
            if past_key_values is not None:
                raise ValueError(
                    "past_key_values: packed documents have no single state; leave the cache out"
                )
            x, key_mask, cu_seqlens = documents.flatten(x), None, documents.cu_seqlens
        use_cache = self._keeps_cache(use_cache, packed=documents is not None)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if self.position is not None:
            count_padding = self.config.count_padding
            position = positions_in_texts(x, past, key_mask, past_mask, cu_seqlens, count_padding)
            x = x + self.position(position).to(x.dtype)
        keep = self.config.output_hidden_states
        keep = bool(keep if output_hidden_states is None else output_hidden_states)
        hidden = self._run_layers(x, key_mask, cu_seqlens, past_key_values, past_mask, past, keep)
        if documents is not None:
            hidden = [documents.restore(h, B, T) for h in hidden]
        return BaseModelOutputWithPast(
            last_hidden_state=hidden[-1],
            past_key_values=past_key_values if use_cache else None,
            hidden_states=tuple(hidden) if keep else None,
        )

    def _embed_tokens(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        check_tokens(input_ids, inputs_embeds, self.config.hidden_size)
        if input_ids is None:
            assert inputs_embeds is not None
            return inputs_embeds
        try:
            x: Tensor = self.embed_tokens(input_ids)
        except IndexError as error:
            raise ValueError(
                f"input_ids: expected ids from 0 to vocab_size - 1 = {self.config.vocab_size - 1},"
                f" got {int(input_ids.min())} to {int(input_ids.max())}; is the tokenizer the"
                " model's?"
            ) from error
        return x

    def _keeps_cache(self, use_cache: bool | None, *, packed: bool) -> bool:
        """Whether a call fills a cache. None in `use_cache` leaves it to the configuration."""
        if packed or not self.config.is_causal:
            return False
        if self.training and self.layers[0].gradient_checkpointing:
            return False
        if use_cache is None:
            exporting = torch.compiler.is_exporting()
            return bool(self.config.use_cache and not self.training and not exporting)
        return use_cache

    def _run_layers(
        self,
        x: Tensor,
        key_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        past_key_values: Cache | None,
        past_mask: Tensor | None,
        past: int,
        keep: bool,
    ) -> list[Tensor]:
        """The normed output; with `keep`, the inputs of all blocks before it."""
        x = self.dropout(x)
        hidden = []
        # fewer than the model's layers while early layers draft (assistant_early_exit)
        depth = self.config.num_hidden_layers
        for wrap in range(self.config.wraps):
            if self.wrap_bias is not None:
                x = x + self.wrap_bias[wrap].to(x.dtype)
            for layer, block in enumerate(islice(self.layers, depth)):
                if keep:
                    hidden.append(x)
                x = block(
                    x,
                    key_mask=key_mask,
                    cu_seqlens=cu_seqlens,
                    past_key_values=past_key_values,
                    past_mask=past_mask,
                    length=past + x.shape[1],
                    cache_index=wrap * depth + layer,
                )
        return [*hidden, self.norm(x)]


class CumulantWithLogits(CumulantPreTrainedModel):
    """The model with logits, whose matrix is that of the embedding by default."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 (the base class's convention)

    def __init__(self, config: CumulantConfig):
        super().__init__(config)
        self.model = CumulantModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.logits_bias)
        if config.tie_word_embeddings:
            self._keys_to_ignore_on_save = ["lm_head.weight"]
        self.logit_ffn = (
            None
            if config.logit_ffn is None
            else LogitFeedForward(config.vocab_size, config.logit_ffn)
        )
        self.post_init()

    def logits(self, hidden: Tensor) -> Tensor:
        """``[..., D]`` -> ``[..., vocab_size]``."""
        logits = project(self.lm_head, hidden)
        return logits if self.logit_ffn is None else self.logit_ffn(logits)

    def plain_head(self) -> nn.Linear | None:
        """The layer that alone makes the logits, by a matrix and a bias; None if more does."""
        own = type(self).logits is CumulantWithLogits.logits and "logits" not in vars(self)
        plain = own and self.logit_ffn is None and is_plain(self.lm_head)
        return self.lm_head if plain else None


@stepped_as_a_whole
class CumulantForCausalLM(CumulantWithLogits, CumulantGenerationMixin):
    """The causal language model.

    `generate`, `save_pretrained`, `Trainer` and `AutoModelForCausalLM` work as for other models.
    """

    def __init__(self, config: CumulantConfig):
        if not config.is_causal:
            raise ValueError(
                "is_causal: a causal language model cannot see later tokens; use"
                " CumulantForMaskedLM"
            )
        super().__init__(config)

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        cu_seqlens: Tensor | None = None,
        seq_idx: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Unpack[CausalArguments],
    ) -> CausalLMOutputWithPast:
        """Logits ``[B, T, vocab_size]``, and with `labels` the mean cross entropy in nats.

        Args:
            input_ids: ``[B, T]``; with a cache, any number of new tokens.
            attention_mask: ``[B, T]``, with a cache ``[B, S + T]``; 0 marks padding, on either
                side. None: there is no padding, neither here nor in the cache.
            position_ids: ``[B, T]``, only to mark documents, which do not see each other. Positions
                rise by one in a document, and a smaller one starts the next.
            past_key_values: cache of earlier tokens, from a call with ``use_cache=True`` or
                ``transformers.DynamicCache(config=model.config)``.
            inputs_embeds: ``[B, T, D]`` in place of `input_ids`.
            labels: ``[B, T]``, not shifted, as `input_ids`. -100 and the first token of a packed
                document are left out.
            use_cache: return the cache; by default when neither training nor exporting.
            output_hidden_states: return the residual stream after the embedding and after each run
                of a block.
            cu_seqlens: ``[N + 1]`` offsets of documents packed end to end in one row (B = 1), in
                place of `position_ids`.
            seq_idx: ``[B, T]``, a number for each document, in place of `position_ids`.
            token_type_ids: zeros.
            logits_to_keep: compute logits for this number of last tokens (0: all), for indices
                ``[n]`` or ``[B, n]``, or where a mask ``[B, T]`` is true.
            kwargs: `CausalArguments`, which other models take too.

        Raises:
            TypeError: an argument that no model knows.
            ValueError: an argument that would change the result but cannot be used, by name.
        """
        shift_labels, skip = kwargs.pop("shift_labels", None), kwargs.pop("skip_logits", None)
        check_skip_logits(skip, labels, shift_labels)
        given = [position_ids, inputs_embeds, labels, cu_seqlens, seq_idx, token_type_ids]
        given += [shift_labels, None if isinstance(logits_to_keep, int) else logits_to_keep]
        if use_cache is not False and not output_hidden_states and all(x is None for x in given):
            stepped = step_model(self, input_ids, attention_mask, past_key_values, kwargs)
            if stepped is not None:
                return stepped
        packing = {"position_ids": position_ids, "seq_idx": seq_idx, "cu_seqlens": cu_seqlens}
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            token_type_ids=token_type_ids,
            **packing,
            **{**kwargs, "return_dict": True},
        )
        hidden = outputs.last_hidden_state
        kept = select_hidden_states(hidden, logits_to_keep)
        logits = None if skip else self.logits(kept)
        loss, items = None, kwargs.get("num_items_in_batch")
        if labels is not None:
            check_labels(labels, kept)
            marks = Marks.read(kwargs, **packing)
            labels, items = ignore_first_labels(
                labels, marks, attention_mask, hidden.shape[1], items
            )
        if labels is not None or shift_labels is not None:
            loss = causal_loss(self, kept, logits, labels, shift_labels, items)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )
