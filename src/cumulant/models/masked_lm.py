"""The masked language model, an encoder: every token sees all others."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from transformers.modeling_outputs import MaskedLMOutput
from transformers.utils.generic import can_return_tuple

from .config import CumulantConfig
from .inputs import LossArguments, check_labels, check_skip_logits
from .language_model import CumulantWithLogits
from .loss import masked_loss

if TYPE_CHECKING:
    from typing_extensions import Unpack


class CumulantForMaskedLM(CumulantWithLogits):
    """Masked language model, whose mixers attend in both directions.

    `Trainer`, `save_pretrained` and `AutoModelForMaskedLM` work as for other models.

    >>> from cumulant.models import from_preset
    >>> config = from_preset("flash", is_causal=False, vocab_size=300, num_hidden_layers=2)
    >>> CumulantForMaskedLM(config)(torch.randint(300, (1, 10))).logits.shape
    torch.Size([1, 10, 300])
    """

    def __init__(self, config: CumulantConfig):
        if config.is_causal:
            raise ValueError(
                "is_causal: an encoder sees later tokens; give the configuration is_causal=False"
            )
        super().__init__(config)

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        cu_seqlens: Tensor | None = None,
        seq_idx: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        **kwargs: Unpack[LossArguments],
    ) -> MaskedLMOutput:
        """Logits ``[B, T, vocab_size]``, and with `labels` the mean cross entropy in nats.

        Args:
            input_ids: ``[B, T]``.
            attention_mask: ``[B, T]``; 0 marks padding, anywhere in a row.
            inputs_embeds: ``[B, T, D]`` in place of `input_ids`.
            labels: ``[B, T]``, the expected token at each position; -100 is left out.
            output_hidden_states: return the residual stream after the embedding and after each
                block.
            position_ids, seq_idx, cu_seqlens: marks of packed texts, see
                `CumulantForCausalLM.forward`.
            token_type_ids: zeros.
            kwargs: `LossArguments`, which other models take too.
        """
        skip = kwargs.pop("skip_logits", None)
        check_skip_logits(skip, labels)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            output_hidden_states=output_hidden_states,
            cu_seqlens=cu_seqlens,
            seq_idx=seq_idx,
            token_type_ids=token_type_ids,
            **{**kwargs, "return_dict": True},
        )
        hidden = outputs.last_hidden_state
        logits = None if skip else self.logits(hidden)
        loss = None
        if labels is not None:
            check_labels(labels, hidden)
            loss = masked_loss(self, hidden, logits, labels, kwargs.get("num_items_in_batch"))
        return MaskedLMOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)
