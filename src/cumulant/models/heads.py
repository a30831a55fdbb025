"""Classification heads, built from transformers' generic classes."""

from __future__ import annotations

from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)

from .language_model import CumulantPreTrainedModel


class CumulantForSequenceClassification(GenericForSequenceClassification, CumulantPreTrainedModel):  # type: ignore[misc]
    """Logits ``[B, num_labels]`` from the last token of each row that is not `pad_token_id`.

    With ``num_labels=1`` it is a reward model.
    """

    accepts_loss_kwargs = False  # the loss is the mean over the batch


class CumulantForTokenClassification(GenericForTokenClassification, CumulantPreTrainedModel):  # type: ignore[misc]
    """Logits ``[B, T, num_labels]``."""

    accepts_loss_kwargs = False


class CumulantForQuestionAnswering(GenericForQuestionAnswering, CumulantPreTrainedModel):  # type: ignore[misc]
    """Logits ``[B, T]`` for the first and for the last token of an answer."""

    accepts_loss_kwargs = False
