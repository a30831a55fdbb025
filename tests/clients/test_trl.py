"""TRL: fine-tuning with an adapter, packed or not, from a path; a reward model."""

import pytest
import torch

trl = pytest.importorskip("trl")
peft = pytest.importorskip("peft")

from datasets import Dataset  # noqa: E402

from cumulant.models import CumulantForSequenceClassification  # noqa: E402

from .common import PEERS, TOKENIZER, build, config  # noqa: E402

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning"
)
TEXTS = [
    "ab ab ab ab",
    "one two",
    "linear attention adds up",
    "x",
    "packed documents keep apart",
    "abc abc",
]


def settings(folder, **more):
    options = {
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataset_num_proc": None,
        "dataloader_pin_memory": False,
    }
    return trl.SFTConfig(output_dir=str(folder), **{**options, **more})


def trainer(kind, folder, *, adapter=False, **more):
    return trl.SFTTrainer(
        model=build(kind),
        args=settings(folder, **more),
        train_dataset=Dataset.from_dict({"text": TEXTS}),
        processing_class=TOKENIZER,
        peft_config=peft.LoraConfig(r=4, task_type="CAUSAL_LM") if adapter else None,
    )


@pytest.mark.parametrize("kind", PEERS)
def test_sft_with_lora(kind, tmp_path):
    run = trainer(kind, tmp_path, adapter=True)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert len(losses) == 2
    assert all(0 < loss < 20 for loss in losses)


@pytest.mark.parametrize("kind", PEERS)
def test_packed_batches_are_the_documents(kind, tmp_path):
    """In TRL's best-fit packing, a batch's loss is the mean over its documents, each alone."""
    run = trainer(kind, tmp_path, packing=True, max_length=64, packing_strategy="bfd")
    batch = next(iter(run.get_train_dataloader()))
    assert (batch["position_ids"] == 0).sum() > 2
    model = run.model.eval().double()
    ids, starts = batch["input_ids"], (batch["position_ids"][0] == 0).nonzero()[:, 0].tolist()
    pieces = ids.split([b - a for a, b in zip(starts, [*starts[1:], ids.shape[1]])], 1)
    out = model(**batch, use_cache=False)
    assert torch.allclose(
        out.logits, torch.cat([model(piece).logits for piece in pieces], 1), atol=1e-6
    )
    nats = sum(
        model(piece, labels=piece).loss.item() * (piece.shape[1] - 1)
        for piece in pieces
        if piece.shape[1] > 1
    )
    assert out.loss.item() == pytest.approx(
        nats / sum(piece.shape[1] - 1 for piece in pieces), rel=1e-6
    )
    model.float()
    run.train()


@pytest.mark.parametrize("kind", ["llama", "taylor", "flash"])
def test_packed_training_is_padded_training(kind, tmp_path):
    """Documents in one row without padding, or padded, give the same loss at every step."""
    losses = []
    for more in ({"padding_free": True}, {}):
        run = trainer(kind, tmp_path, per_device_train_batch_size=6, max_length=None, **more)
        run.train()
        losses.append([entry["loss"] for entry in run.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_from_a_path(tmp_path):
    """As `trl sft --model_name_or_path` does it, saved again with all that loads it."""
    build("taylor").save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    run = trl.SFTTrainer(
        model=str(tmp_path / "model"),
        args=settings(tmp_path / "out", model_init_kwargs={"trust_remote_code": True}),
        train_dataset=Dataset.from_dict({"text": TEXTS}),
    )
    run.train()
    run.save_model()
    assert {"modeling_cumulant.py", "config.json", "README.md"} <= {
        p.name for p in (tmp_path / "out").iterdir()
    }


def test_a_feed_forward_over_the_logits_is_not_left_out(tmp_path):
    """TRL multiplies by the logits' matrix itself."""
    train = Dataset.from_dict({"text": TEXTS})
    with pytest.raises(ValueError, match="logit_ffn: this program forms the logits itself"):
        trl.SFTTrainer(
            model=build("taylor", logit_ffn=8),
            args=settings(tmp_path),
            train_dataset=train,
            processing_class=TOKENIZER,
        )


@pytest.mark.parametrize("kind", ["llama", "taylor", "flash"])
def test_grpo(kind, tmp_path):
    """Generation and training in turns."""
    options = {
        "max_steps": 2,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
    }
    options |= {"num_generations": 2, "max_completion_length": 6, "per_device_train_batch_size": 2}
    run = trl.GRPOTrainer(
        model=build(kind),
        reward_funcs=lambda completions, **_: [float(len(set(text))) for text in completions],
        args=trl.GRPOConfig(
            output_dir=str(tmp_path), save_strategy="no", dataloader_pin_memory=False, **options
        ),
        train_dataset=Dataset.from_dict({"prompt": TEXTS}),
        processing_class=TOKENIZER,
    )
    run.train()
    assert run.state.global_step == 2


def test_reward_model(tmp_path):
    pairs = {"chosen": [f"good {t}" for t in TEXTS], "rejected": [f"bad {t}" for t in TEXTS]}
    options = {
        "max_steps": 2,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
    }
    run = trl.RewardTrainer(
        model=CumulantForSequenceClassification(config("taylor", num_labels=1)),
        args=trl.RewardConfig(
            output_dir=str(tmp_path), save_strategy="no", dataloader_pin_memory=False, **options
        ),
        train_dataset=Dataset.from_dict(pairs),
        processing_class=TOKENIZER,
    )
    run.train()
    assert run.state.global_step == 2


def test_dpo_with_lora(tmp_path):
    pairs = {
        "prompt": TEXTS,
        "chosen": [f" good {t}" for t in TEXTS],
        "rejected": [f" bad {t}" for t in TEXTS],
    }
    options = {
        "max_steps": 2,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
    }
    run = trl.DPOTrainer(
        model=build("taylor"),
        args=trl.DPOConfig(
            output_dir=str(tmp_path), save_strategy="no", dataloader_pin_memory=False, **options
        ),
        train_dataset=Dataset.from_dict(pairs),
        processing_class=TOKENIZER,
        peft_config=peft.LoraConfig(r=4, task_type="CAUSAL_LM"),
    )
    run.train()
    assert run.state.global_step == 2
