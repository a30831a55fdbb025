"""The methods of the language model that transformers' `generate` calls."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import GenerationMixin
from transformers.cache_utils import Cache

from .decoding import can_decode, decode


class CumulantGenerationMixin(GenerationMixin):  # type: ignore[misc]
    """transformers' `generate`, adapted to states of fixed size."""

    def _prepare_cache_for_generation(
        self, generation_config: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if generation_config.cache_implementation == "quantized":
            raise ValueError(
                "cache_implementation: 'quantized' cannot hold this model's states, which are kept"
                " in full precision; use 'dynamic' (the default), 'static' or 'offloaded'"
            )
        return super()._prepare_cache_for_generation(generation_config, *args, **kwargs)

    def _sample(
        self,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """Greedy decoding and sampling; see `decoding.decode`."""
        if synced_gpus or not can_decode(input_ids, generation_config, model_kwargs):
            return super()._sample(
                input_ids,
                logits_processor=logits_processor,
                stopping_criteria=stopping_criteria,
                generation_config=generation_config,
                synced_gpus=synced_gpus,
                streamer=streamer,
                **model_kwargs,
            )
        return decode(
            self,
            input_ids,
            logits_processor,
            stopping_criteria,
            generation_config,
            streamer,
            model_kwargs,
        )

    def init_continuous_batching(self, *_: Any, **__: Any) -> Any:
        raise ValueError(
            "generate_batch: continuous batching keeps keys and values in pages, and these models"
            " keep states; use generate with a padded batch"
        )

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None = None, **_: Any) -> Tensor | None:
        """Masks stay ``[B, S]``, as mixers take them."""
        return attention_mask

    def _prepare_position_ids_for_generation(self, *_: Any) -> None:
        """None, as the model counts positions itself."""

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The arguments of `forward` for the next step.

        `generate` reads this signature. It passes on its own tokenizers, which are removed here.
        """
        if next_sequence_length is not None and next_sequence_length < 1:
            # transformers would read all tokens again
            seen = input_ids.shape[1] - next_sequence_length
            raise ValueError(
                f"past_key_values: has seen {seen} tokens and input_ids holds {input_ids.shape[1]};"
                " generation needs at least one more: pass it, or read one token less into the"
                " cache"
            )
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        return {
            name: value
            for name, value in inputs.items()
            if name not in ("tokenizer", "assistant_tokenizer")
        }
