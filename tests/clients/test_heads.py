"""Heads and pipelines: the tasks that a model of the Hugging Face hub can have."""

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlamaModel,
    pipeline,
)
from transformers.models.auto import modeling_auto

from cumulant.models import (
    CumulantForQuestionAnswering,
    CumulantForSequenceClassification,
    CumulantForTokenClassification,
    CumulantModel,
)

from .common import KINDS, TOKENIZER, build, config, tokens

SEQUENCE = {"llama": LlamaForSequenceClassification}
TOKEN = {"llama": LlamaForTokenClassification}
BASE = {"llama": LlamaModel}


@pytest.mark.parametrize("kind", ["llama", *KINDS])
def test_sequence_classification(kind, tmp_path):
    """The last token decides, wherever padding is, also after saving."""
    torch.manual_seed(0)
    cls = SEQUENCE.get(kind, CumulantForSequenceClassification)
    model = cls(config(kind, num_labels=3)).eval()
    ids, mask = torch.full((2, 8), 256), torch.zeros(2, 8, dtype=torch.long)
    text = tokens(1, 5)
    ids[0, :5], mask[0, :5] = text, 1
    ids[1, 3:], mask[1, 3:] = text, 1
    both = model(ids, attention_mask=mask).logits
    assert both.shape == (2, 3)
    alone = model(text).logits[0]
    assert torch.allclose(both[0], alone, atol=1e-4)
    if kind != "llama":  # its positions count the padding
        assert torch.allclose(both[1], alone, atol=1e-4)
    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(again) is cls
    assert again.config.num_labels == 3
    assert torch.allclose(again(text).logits[0], alone, atol=1e-5)
    loss = model(ids, attention_mask=mask, labels=torch.tensor([0, 2])).loss
    expected = torch.nn.functional.cross_entropy(both, torch.tensor([0, 2]))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    loss.backward()
    assert model.model.embed_tokens.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", ["llama", "taylor", "flash"])
def test_token_classification_and_answers(kind, tmp_path):
    ids = tokens(2, 6)
    model = TOKEN.get(kind, CumulantForTokenClassification)(
        config(kind, num_labels=5, classifier_dropout=0.0)
    ).eval()
    assert model(ids, labels=ids % 5).logits.shape == (2, 6, 5)
    model.save_pretrained(tmp_path / "token")
    again = AutoModelForTokenClassification.from_pretrained(tmp_path / "token")
    assert torch.allclose(again(ids).logits, model(ids).logits, atol=1e-5)
    if kind != "llama":
        answers = CumulantForQuestionAnswering(config(kind)).eval()
        place = torch.tensor([1, 2])
        assert answers(ids, start_positions=place, end_positions=place + 1).loss > 0
        answers.save_pretrained(tmp_path / "answers")
        again = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "answers")
        assert torch.allclose(again(ids).start_logits, answers(ids).start_logits, atol=1e-5)


def test_bidirectional_heads():
    """On an encoder, the last token has seen all."""
    model = CumulantForSequenceClassification(config("flash", is_causal=False, num_labels=2)).eval()
    ids = tokens(1, 6)
    assert model(ids).logits.shape == (1, 2)


@pytest.mark.parametrize("kind", ["llama", *KINDS])
def test_base_models(kind, tmp_path):
    """`AutoModel` loads its own folder and a language model's, and the features pipeline runs."""
    language_model = build(kind)
    language_model.save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path)
    assert type(model) is BASE.get(kind, CumulantModel)
    ids = torch.tensor([TOKENIZER("features")["input_ids"]])
    expected = language_model.model(ids).last_hidden_state
    assert torch.allclose(model(ids).last_hidden_state, expected, atol=1e-5)
    features = pipeline("feature-extraction", model=model, tokenizer=TOKENIZER)(
        "features", return_tensors=True
    )
    assert torch.allclose(features, expected, atol=1e-5)


@pytest.mark.parametrize("task", ["text-classification", "token-classification"])
def test_pipelines_of_heads(task):
    cls = (
        CumulantForSequenceClassification
        if task == "text-classification"
        else CumulantForTokenClassification
    )
    pipe = pipeline(task, model=cls(config("taylor", num_labels=2)).eval(), tokenizer=TOKENIZER)
    found = pipe(["one", "another text"], batch_size=2)
    assert len(found) == 2


@pytest.mark.parametrize("fields", [{}, {"is_causal": False}])
def test_auto_classes_from_a_configuration(fields):
    auto = AutoModelForMaskedLM if fields else AutoModelForCausalLM
    assert auto.from_config(config("flash", **fields)).config.is_causal == (not fields)


def test_names_in_the_tables():
    """Trainer and servers find classes by name, and transformers' own tables still work."""
    assert modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["cumulant"] == "CumulantForCausalLM"
    assert modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES["cumulant"] == "CumulantForMaskedLM"
    for auto in (AutoModelForCausalLM, AutoModelForTokenClassification):
        assert len(list(auto._model_mapping.items())) > 20
