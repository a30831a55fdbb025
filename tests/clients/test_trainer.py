"""A user's own `Trainer` evaluates, keeps the best model and predicts, on every kind of model."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForTokenClassification,
    DataCollatorWithFlattening,
    Trainer,
    TrainingArguments,
)
from transformers.utils.generic import find_labels

from cumulant.models import (
    CumulantForCausalLM,
    CumulantForMaskedLM,
    CumulantForQuestionAnswering,
    CumulantForSequenceClassification,
    CumulantForTokenClassification,
)
from cumulant.text.tokenizer import byte_tokenizer

from .common import PEERS, build, config

TOKENIZER = byte_tokenizer()  # its own: pipelines and lm-eval turn theirs to padding on the left

TEXTS = ["ab ab ab ab", "one two", "linear attention adds up", "xy", "packed documents", "abc abc"]
ROWS = [
    {"input_ids": TOKENIZER(text)["input_ids"], "attention_mask": [1] * len(text)} for text in TEXTS
]


def trainer(folder, model, collator, *, rows=ROWS, **more):
    options = {
        "max_steps": 4,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "no",
        "logging_steps": 2,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    metrics = more.pop("compute_metrics", None)
    return Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(folder), **{**options, **more}),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows),
        data_collator=collator,
        processing_class=TOKENIZER,
        compute_metrics=metrics,
    )


def causal_collator():
    return DataCollatorForLanguageModeling(TOKENIZER, mlm=False)


def test_labels_are_the_labels():
    assert find_labels(CumulantForCausalLM) == find_labels(CumulantForMaskedLM) == ["labels"]
    assert (
        find_labels(CumulantForSequenceClassification)
        == find_labels(CumulantForTokenClassification)
        == ["labels"]
    )
    assert find_labels(CumulantForQuestionAnswering) == ["start_positions", "end_positions"]


@pytest.mark.parametrize("kind", PEERS)
def test_evaluation_is_the_loss_of_the_labels(kind, tmp_path):
    run = trainer(tmp_path, build(kind), causal_collator())
    nats, count = 0.0, 0
    for batch in run.get_eval_dataloader():
        nats += run.model(**batch).loss.item() * len(
            batch["input_ids"]
        )  # Trainer weighs batches by rows
        count += len(batch["input_ids"])
    assert run.evaluate()["eval_loss"] == pytest.approx(nats / count, rel=1e-4)


@pytest.mark.parametrize("kind", ["llama", "taylor", "elita"])
def test_best_model_predictions_and_metrics(kind, tmp_path):
    best = {
        "load_best_model_at_end": True,
        "save_strategy": "steps",
        "save_steps": 2,
        "metric_for_best_model": "loss",
    }

    def accuracy(p):
        return {"right": float(np.mean(p.predictions.argmax(-1)[:, :-1] == p.label_ids[:, 1:]))}

    run = trainer(
        tmp_path,
        build(kind),
        causal_collator(),
        compute_metrics=accuracy,
        learning_rate=1e-3,
        **best,
    )
    run.train()
    assert run.state.best_metric == min(
        e["eval_loss"] for e in run.state.log_history if "eval_loss" in e
    )
    found = run.predict(Dataset.from_list(ROWS))
    assert found.predictions.shape[::2] == (6, 257)
    assert found.label_ids.shape[0] == 6
    assert 0 <= found.metrics["test_right"] <= 1


@pytest.mark.parametrize("kind", ["llama", "taylor", "flash"])
def test_accumulated_batches_are_one_batch(kind, tmp_path):
    losses = []
    for rows, steps in ((6, 1), (2, 3), (1, 6)):
        options = {
            "per_device_train_batch_size": rows,
            "gradient_accumulation_steps": steps,
            "logging_steps": 1,
        }
        run = trainer(tmp_path, build(kind), causal_collator(), learning_rate=1e-3, **options)
        run.train()
        losses.append([entry["loss"] for entry in run.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0] == pytest.approx(losses[2], rel=1e-3)


@pytest.mark.parametrize("kind", ["taylor", "based", "gated_taylor", "flash", "elita"])
def test_flattened_training_is_padded_training(kind, tmp_path):
    losses = []
    for collator in (DataCollatorWithFlattening(return_flash_attn_kwargs=True), causal_collator()):
        options = {
            "per_device_train_batch_size": 6,
            "logging_steps": 1,
            "eval_strategy": "no",
            "learning_rate": 1e-3,
        }
        rows = [{"input_ids": row["input_ids"]} for row in ROWS]
        run = trainer(tmp_path, build(kind), collator, rows=rows, **options)
        run.train()
        losses.append([entry["loss"] for entry in run.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_a_column_of_positions_reaches_the_model(tmp_path):
    """Trainer drops columns that no argument names, so columns that mark documents are named."""
    rows = [
        {"input_ids": [1, 2, 3, 4, 5, 6], "labels": [1, 2, 3, 4, 5, 6], **marks}
        for marks in ({"position_ids": [0, 1, 2, 0, 1, 2]}, {"position_ids": [0, 1, 0, 1, 2, 3]})
    ]
    model = build("taylor")
    run = trainer(tmp_path, model, None, rows=rows)
    parts = [torch.tensor([piece]) for piece in ([1, 2, 3], [4, 5, 6], [1, 2], [3, 4, 5, 6])]
    nats = sum(model(p, labels=p).loss.item() * (p.shape[1] - 1) for p in parts)
    assert run.evaluate()["eval_loss"] == pytest.approx(
        nats / sum(p.shape[1] - 1 for p in parts), rel=1e-4
    )


def test_masked_model(tmp_path):
    model = CumulantForMaskedLM(config("flash", is_causal=False))
    TOKENIZER.add_special_tokens({"mask_token": "<|endoftext|>"})
    run = trainer(tmp_path, model, DataCollatorForLanguageModeling(TOKENIZER, mlm_probability=0.5))
    run.train()
    assert run.evaluate()["eval_loss"] > 0


@pytest.mark.parametrize("head", ["sequence", "token", "reward"])
def test_heads(head, tmp_path):
    rows = [{**row, "labels": i % 3} for i, row in enumerate(ROWS)]
    collator, fields, cls = None, {"num_labels": 3}, CumulantForSequenceClassification
    if head == "token":
        rows = [{**row, "labels": [t % 3 for t in row["input_ids"]]} for row in ROWS]
        collator, cls = (
            DataCollatorForTokenClassification(TOKENIZER),
            CumulantForTokenClassification,
        )
    elif head == "reward":
        rows, fields = (
            [{**row, "labels": float(i)} for i, row in enumerate(ROWS)],
            {"num_labels": 1},
        )
    run = trainer(tmp_path, cls(config("taylor", **fields)), collator, rows=rows)
    run.train()
    assert run.evaluate()["eval_loss"] > 0


@pytest.mark.parametrize("kind", ["llama", "taylor"])
def test_smoothed_labels_are_shifted(kind, tmp_path):
    """Trainer shifts labels by the class's name: unknown classes learnt to repeat a token."""
    model = build(kind)
    options = {
        "label_smoothing_factor": 0.2,
        "per_device_eval_batch_size": 1,
        "eval_strategy": "no",
        "max_steps": 1,
    }
    row = [{"input_ids": [1, 2, 3, 4, 5], "attention_mask": [1] * 5}]
    found = trainer(tmp_path, model, causal_collator(), rows=row, **options).evaluate()["eval_loss"]
    with torch.no_grad():
        logits = model(torch.tensor([[1, 2, 3, 4, 5]])).logits[0, :-1]
    expected = torch.nn.functional.cross_entropy(
        logits, torch.tensor([2, 3, 4, 5]), label_smoothing=0.2
    )
    assert found == pytest.approx(expected.item(), rel=1e-4)


def test_a_loss_of_the_users(tmp_path):
    """`compute_loss_func` is handed the logits and the labels."""
    seen = []

    def loss(outputs, labels, num_items_in_batch=None):
        seen.append((outputs.logits.shape[:2], labels.shape))
        return outputs.logits.square().mean()

    run = trainer(tmp_path, build("taylor"), causal_collator(), eval_strategy="no", max_steps=1)
    run.compute_loss_func = loss
    run.train()
    assert seen[0][0] == seen[0][1]
