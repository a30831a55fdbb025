"""Train a language model on a text: the main job, top to bottom."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainerControl, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from ..models import CumulantConfig, CumulantForCausalLM, from_preset
from .checkpoint import checkpoint_folder
from .corpus import Corpus, load_corpus
from .evaluate import Score, windowed
from .options import TrainingOptions
from .runs import WHOLE, check_unused, note_options, resumed, write_json
from .tokenizer import byte_tokenizer, load_tokenizer, train_bpe
from .tokens import (
    DisjointWindows,
    PackedDocuments,
    RandomWindows,
    TokenFile,
    check_tokens,
    collate,
    read_tokens,
    write_tokens,
)
from .warm_start import freeze_backbone, inherited_configuration, inherited_model


class Text(NamedTuple):
    """A text as tokens, and what made them of it."""

    tokenizer: PreTrainedTokenizerFast
    train: TokenFile
    heldout: TokenFile


@dataclass(frozen=True)
class TrainingResult:
    """losses: (step, nats per token) as logged. score: the final model on the held-out text, windowed."""

    output: str
    losses: list[tuple[int, float]]
    score: Score
    parameters: int
    tokens_per_second: float


class LanguageModelTrainer(Trainer):  # type: ignore[misc]
    """Hugging Face's Trainer, evaluating in bits per byte over the whole held-out text."""

    def __init__(self, *, heldout: TokenFile, context: int, schedule: str, **kwargs: Any):
        super().__init__(eval_dataset=heldout, **kwargs)
        self.heldout, self.context, self.schedule = heldout, context, schedule

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        if self.schedule == "capped_inverse_sqrt":
            optimizer = self.optimizer if optimizer is None else optimizer
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer, lambda done: min(1.0, 10 / math.sqrt(done + 1))
            )
        else:
            super().create_scheduler(num_training_steps, optimizer)
        scheduler: torch.optim.lr_scheduler.LRScheduler = self.lr_scheduler
        return scheduler

    def evaluate(self, *_: Any, metric_key_prefix: str = "eval", **__: Any) -> dict[str, float]:
        model = self.accelerator.unwrap_model(self.model)
        model.eval()
        with self.compute_loss_context_manager():
            nats, count = windowed(
                self.model_wrapped if self.is_fsdp_enabled else model,
                self.heldout,
                self.context,
                batch_size=self.args.per_device_eval_batch_size,
                rank=0 if self.is_fsdp_enabled else self.args.process_index,
                processes=1 if self.is_fsdp_enabled else self.args.world_size,
            )
        total = torch.tensor([nats, count], dtype=torch.float64, device=self.args.device)
        if self.args.world_size > 1 and not self.is_fsdp_enabled:
            total = self.accelerator.reduce(total)
        nats, count = total.tolist()
        metrics = {
            f"{metric_key_prefix}_loss": nats / count,
            f"{metric_key_prefix}_bits_per_byte": nats / math.log(2) / self.heldout.text_bytes,
        }
        self.log(metrics)
        control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.control: TrainerControl = control
        return metrics


class MarkWhole(TrainerCallback):  # type: ignore[misc]
    """Leaves a mark in each checkpoint once everything in it is written."""

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            write_json(folder / WHOLE, {"step": state.global_step})


class Bar(ProgressCallback):  # type: ignore[misc]
    """The progress bar, on a terminal."""

    def on_log(self, *_: Any, **__: Any) -> None:
        """Leave logs to `Lines`."""


class Lines(TrainerCallback):  # type: ignore[misc]
    """About twenty lines on the loss, and one an evaluation."""

    def __init__(self, say: Callable[[str], None]):
        self.say, self.next_line = say, 0

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        logs = logs or {}
        if not state.is_world_process_zero:
            return
        if "loss" in logs and state.global_step >= self.next_line:
            self.next_line = state.global_step + max(1, state.max_steps // 20)
            loss, rate = float(logs["loss"]), float(logs["learning_rate"])
            self.say(f"step {state.global_step:>6}  loss {loss:.4f}  lr {rate:.2e}")
        elif "eval_bits_per_byte" in logs:
            bits = float(logs["eval_bits_per_byte"])
            self.say(f"step {state.global_step:>6}  held out {bits:.4f} bits per byte")


def train(options: TrainingOptions, *, text: Text | None = None, say: Callable[[str], None] = print) -> TrainingResult:
    """Read the text, train the model, evaluate it on the held-out part and leave it in ``options.output``.

    With `text`, the options' data and tokenizer are not read: several runs share one tokenized text.

    Raises:
        ValueError: for anything that the user can mend, before training starts.
    """
    say = say if int(os.environ.get("RANK", "0")) == 0 else (lambda _: None)
    start = None
    if options.resume:
        options, start = resumed(options, say)
    else:
        check_unused(Path(options.output))
    arguments = _arguments(options)
    tokenizer, tokens, heldout = _prepare_text(options, arguments, say) if text is None else text
    if text is not None and not options.resume:
        _begin(options, tokenizer)
    set_seed(options.seed)
    model = _model(options, tokenizer, start)
    parameters, trained = model.num_parameters(), model.num_parameters(only_trainable=True)
    some = "" if trained == parameters else f", {trained:,} of them trained"
    layers = f"{model.config.num_hidden_layers} layers of {model.config.hidden_size}"
    say(f"model: {model.config.preset}, {parameters:,} parameters{some}, {layers}")
    window = PackedDocuments if options.packed else DisjointWindows if options.disjoint else RandomWindows
    windows = options.steps * options.batch * options.accumulate * arguments.world_size
    trainer = LanguageModelTrainer(
        model=model,
        args=arguments,
        train_dataset=window(tokens, options.context, windows, options.seed),
        data_collator=collate,
        processing_class=tokenizer,
        callbacks=[MarkWhole()],
        heldout=heldout,
        context=options.context,
        schedule=options.schedule,
    )
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    if sys.stderr.isatty():
        trainer.add_callback(Bar())
    trainer.add_callback(Lines(say))
    trainer.train(resume_from_checkpoint=str(start) if start else None)
    return _finish(trainer, options, heldout, parameters, say)


def _prepare_text(options: TrainingOptions, arguments: TrainingArguments, say: Callable[[str], None]) -> Text:
    """Tokenizer and both splits, written by the first process and read by all. Nothing is written if anything is
    wrong."""
    output = Path(options.output)
    with arguments.main_process_first(desc="tokenizing"):
        if arguments.process_index == 0:
            corpus = load_corpus(options.data, heldout=options.heldout, text_column=options.text_column)
            for line in corpus.describe():
                say(line)
            if options.resume:
                check_tokens(output / "tokens", corpus)
            else:
                tokenizer = _tokenizer(options, corpus, say)
                _check_model(options, tokenizer)
                write_tokens(output / "tokens", corpus, tokenizer, context=options.context)
                _begin(options, tokenizer)
    return Text(load_tokenizer(output), *read_tokens(output / "tokens"))


def _check_model(options: TrainingOptions, tokenizer: PreTrainedTokenizerFast) -> None:
    """Refuse what cannot be built before anything is written."""
    config = _configuration(options, tokenizer)
    if options.init_from is not None:
        inherited_model(options, config)
    with torch.device("meta"):
        CumulantForCausalLM(config)


def _begin(options: TrainingOptions, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.save_pretrained(options.output)
    note_options(options)


def _model(options: TrainingOptions, tokenizer: PreTrainedTokenizerFast, start: Path | None) -> CumulantForCausalLM:
    """New, or the trained one to start from; a run that goes on finds its weights in its checkpoint."""
    config = _configuration(options, tokenizer, start)
    fresh = options.init_from is None or start is not None
    model = CumulantForCausalLM(config) if fresh else inherited_model(options, config)
    if options.freeze_backbone:
        freeze_backbone(model)
    return model


def _tokenizer(options: TrainingOptions, corpus: Corpus, say: Callable[[str], None]) -> PreTrainedTokenizerFast:
    if options.init_from is not None:
        return load_tokenizer(checkpoint_folder(options.init_from))
    if options.tokenizer is not None:
        return load_tokenizer(options.tokenizer)
    if options.train_bpe is not None:
        say(f"tokenizer: training a byte-level BPE of {options.train_bpe} tokens")
        return train_bpe(corpus.train, options.train_bpe)
    return byte_tokenizer()


def _configuration(
    options: TrainingOptions, tokenizer: PreTrainedTokenizerFast, start: Path | None = None
) -> CumulantConfig:
    """That of the checkpoint `start`, of the model to start from, or one from the preset and the options."""
    if options.init_from is not None:
        return inherited_configuration(options, start or checkpoint_folder(options.init_from))
    fields = {
        "vocab_size": len(tokenizer),
        "hidden_size": options.width,
        "num_hidden_layers": options.depth,
        "num_attention_heads": options.heads,
        "intermediate_size": options.intermediate,
        "dropout": options.dropout,
        "horizon": options.context,
        "logit_ffn": options.logit_ffn,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.eos_token_id,
    }
    return from_preset(options.preset, **{**fields, **options.overrides()})


def _arguments(options: TrainingOptions) -> TrainingArguments:
    every = options.evaluate_every or options.steps
    save = options.save_every or options.evaluate_every or max(1, options.steps // 10)
    best = save % every == 0  # Trainer keeps the best model only where every save follows an evaluation
    checkpointing = "activation_checkpointing"  # its name before transformers 5.23: gradient_checkpointing
    if checkpointing not in TrainingArguments.__dataclass_fields__:
        checkpointing = "gradient_checkpointing"
    return TrainingArguments(
        output_dir=options.output,
        max_steps=options.steps,
        per_device_train_batch_size=options.batch,
        per_device_eval_batch_size=options.batch,
        gradient_accumulation_steps=options.accumulate,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, round(options.warmup * options.steps)),
        weight_decay=options.weight_decay,
        adam_beta2=options.adam_beta2,
        max_grad_norm=options.clip,
        bf16=options.bf16,
        use_cpu=options.device == "cpu" or not torch.cuda.is_available(),
        seed=options.seed,
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="steps",
        save_steps=save,
        save_total_limit=3,
        load_best_model_at_end=best,
        metric_for_best_model="bits_per_byte" if best else None,
        greater_is_better=False if best else None,
        logging_steps=_logging_steps(options.steps, save),
        report_to="tensorboard",
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        fsdp=options.fsdp or None,
        fsdp_config={"transformer_layer_cls_to_wrap": ["CumulantBlock"]} if options.fsdp else None,
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=torch.cuda.is_available() and options.device != "cpu",
        accelerator_config={"split_batches": False, "dispatch_batches": False},
        **{checkpointing: options.gradient_checkpointing},
    )


def _logging_steps(steps: int, save: int) -> int:
    """At most 10 and 1/20 of the run, and a divisor of the steps between checkpoints: a resumed run then logs the means
    over the same steps as one that was not interrupted."""
    return max(d for d in range(1, max(1, min(10, steps // 20)) + 1) if save % d == 0)


def _finish(
    trainer: LanguageModelTrainer,
    options: TrainingOptions,
    heldout: TokenFile,
    parameters: int,
    say: Callable[[str], None],
) -> TrainingResult:
    """Save the model kept, and what the run came to."""
    trainer.save_model(options.output)
    history = trainer.state.log_history
    evaluations = [entry for entry in history if "eval_loss" in entry]
    best = min(evaluations, key=lambda e: e["eval_loss"]) if trainer.args.load_best_model_at_end else evaluations[-1]
    tokens = len(heldout.ids) - 1
    score = Score(best["eval_bits_per_byte"], best["eval_loss"], tokens, heldout.text_bytes)
    losses = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    rate = next((e["train_steps_per_second"] for e in reversed(history) if "train_steps_per_second" in e), 0.0)
    rate *= options.batch * options.accumulate * options.context * trainer.args.world_size
    result = TrainingResult(options.output, losses, score, parameters, rate)
    if trainer.is_world_process_zero():
        summary = {
            "bits_per_byte": score.bits_per_byte,
            "heldout_bytes": score.text_bytes,
            "tokens": score.tokens,
            "context": options.context,
            "parameters": parameters,
            "preset": trainer.model.config.preset,
            "nats_per_token": score.loss,
            "heldout_losses": [(entry["step"], entry["eval_loss"]) for entry in evaluations],
            "losses": losses,
            "tokens_per_second": rate,
        }
        write_json(Path(options.output) / "result.json", summary)
    say(f"held out: {score.bits_per_byte:.4f} bits per byte over {score.text_bytes:,} bytes, context {options.context}")
    return result
