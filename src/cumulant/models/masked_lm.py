"""The encoder: every token sees all others, and masked ones are predicted."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.modeling_outputs import MaskedLMOutput
from transformers.utils.generic import can_return_tuple

from .config import CumulantConfig
from .language_model import CumulantWithLogits


class CumulantForMaskedLM(CumulantWithLogits):
    """Masked language model of mixers that see both ways; `Trainer`, `save_pretrained`, `AutoModelForMaskedLM` work as
    with any other.

    >>> model = CumulantForMaskedLM(from_preset("flash", is_causal=False, vocab_size=30000))
    """

    def __init__(self, config: CumulantConfig):
        if config.is_causal:
            raise ValueError("is_causal: an encoder sees later tokens; give the configuration is_causal=False")
        super().__init__(config)

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        cu_seqlens: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> MaskedLMOutput:
        """Logits ``[B, T, vocab_size]``, and the mean cross entropy in nats if `labels` are given.

        Args:
            input_ids: ``[B, T]``.
            attention_mask: ``[B, T]``; 0 marks padding, anywhere: it does not exist for the others.
            inputs_embeds: ``[B, T, D]`` in place of `input_ids`.
            labels: ``[B, T]``, the token expected at each place; -100 is left out.
            output_hidden_states: return the residual stream after the embedding and after each block.
            cu_seqlens: ``[N + 1]`` offsets of texts packed end to end in one row (B = 1); none sees another.
            num_items_in_batch: divisor of the summed loss, for gradient accumulation.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            output_hidden_states=output_hidden_states,
            cu_seqlens=cu_seqlens,
        )
        logits = self.logits(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            total = nn.functional.cross_entropy(
                logits.float().flatten(0, 1),
                labels.flatten(),
                reduction="mean" if num_items_in_batch is None else "sum",
            )
            loss = total if num_items_in_batch is None else total / num_items_in_batch
        return MaskedLMOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)
