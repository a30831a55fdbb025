"""Train a language model on a text: the main job, top to bottom."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from .build import (
    build_model,
    check_before_reading,
    check_model,
    choose_chat,
    choose_tokenizer,
)
from .corpus import load_corpus
from .evaluate import Score
from .options import TrainingOptions
from .processes import in_first_process, is_first_process, process_count
from .resume import Run, given_options, resume
from .runs import check_unused, locked_folder, write_json
from .tokenizer import load_tokenizer
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
from .trainer import LanguageModelTrainer, LossLines, MarkWhole, ProgressBar, is_disk_full
from .walks import CarriedWindows, DocumentWalks


class Text(NamedTuple):
    """A text as tokens, and its tokenizer."""

    tokenizer: PreTrainedTokenizerFast
    train: TokenFile
    heldout: TokenFile


@dataclass(frozen=True)
class TrainingResult:
    """The outcome of a run.

    losses: (step, nats per token), as logged.
    score: the final model on the held-out text, in windows.
    """

    output: str
    losses: list[tuple[int, float]]
    score: Score
    parameters: int
    tokens_per_second: float


def train(
    options: TrainingOptions,
    *,
    given: Collection[str] | None = None,
    text: Text | None = None,
    say: Callable[[str], None] = print,
) -> TrainingResult:
    """Read the text, train the model, evaluate it on the held-out part, and save it.

    With `text`, the options' data and tokenizer are not read, so several runs share one tokenized
    text. `given` names the options that the user chose; by default, those that differ from their
    defaults. A resumed run takes all others from its folder, ``options.output``.

    Raises:
        ValueError: for any mistake that the user can correct, before training starts.
        Diverged: a loss, a gradient or a weight is not finite; files written before stay as they
            are.
    """
    say = say if is_first_process() else (lambda _: None)
    given = given_options(options) if given is None else given
    with locked_folder(Path(options.output)) if is_first_process() else nullcontext():
        if options.resume:
            run = resume(options, given, process_count(), is_first_process(), say)
        else:
            check_unused(Path(options.output))
            run = Run.new(options)
            check_before_reading(options, given)
        arguments = _trainer_arguments(run)
        if text is None:
            text = _prepare_text(run, given, arguments, say)
        else:
            in_first_process(arguments, lambda: _note_run(run, text.tokenizer, arguments))
        with explain_full_disk(Path(options.output)):
            return _train(run, given, arguments, text, say)


def _train(
    run: Run,
    given: Collection[str],
    arguments: TrainingArguments,
    text: Text,
    say: Callable[[str], None],
) -> TrainingResult:
    options = run.options
    set_seed(options.seed)
    model = build_model(options, text.tokenizer, run.start, given)
    parameters, trained = model.num_parameters(), model.num_parameters(only_trainable=True)
    frozen = "" if trained == parameters else f", {trained:,} of them trained"
    layers = f"{model.config.num_hidden_layers} layers of {model.config.hidden_size}"
    say(f"model: {model.config.preset}, {parameters:,} parameters{frozen}, {layers}")
    trainer = LanguageModelTrainer(
        model=model,
        args=arguments,
        train_dataset=_windows(options, text.train, arguments.world_size),
        data_collator=collate,
        processing_class=text.tokenizer,
        callbacks=[MarkWhole()],
        heldout=text.heldout,
        context=options.context,
        legs=run.legs,
        schedule=options.schedule,
    )
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    if sys.stderr.isatty():
        trainer.add_callback(ProgressBar())
    trainer.add_callback(LossLines(say))
    if options.carry_state != "none":
        trainer.carry_states(run.start)
    trainer.train(resume_from_checkpoint=str(run.start) if run.start else None)
    return _save_results(trainer, options, text.heldout, parameters, say)


def _windows(options: TrainingOptions, tokens: TokenFile, processes: int) -> Dataset[Any]:
    """The windows of all steps."""
    rows = options.batch * options.accumulate * processes
    count = options.steps * rows
    if options.packed:
        return PackedDocuments(tokens, options.context, count, options.seed)
    windows: RandomWindows | DisjointWindows | DocumentWalks
    if options.carry_state == "document":
        windows = DocumentWalks(tokens, options.context, count, options.seed, rows)
    elif options.disjoint:
        windows = DisjointWindows(tokens, options.context, count, options.seed)
    else:
        windows = RandomWindows(tokens, options.context, count, options.seed)
    if options.carry_state == "none":
        return windows
    return CarriedWindows(windows, rows, options.carry_windows)


def _prepare_text(
    run: Run, given: Collection[str], arguments: TrainingArguments, say: Callable[[str], None]
) -> Text:
    """The tokenizer and both splits, written by the first process and read by all.

    Nothing is written if anything is wrong. A resumed run has its tokens; it reads a text again
    only if one is named, to check that it is the same.
    """
    output, options = Path(run.options.output), run.options

    def prepare() -> None:
        if options.resume and "data" not in given:
            _note_run(run, load_tokenizer(output), arguments)
            return
        corpus = load_corpus(
            options.data,
            heldout=options.heldout,
            text_column=options.text_column,
            encoding=options.encoding,
            exclude=[output],
            chat=choose_chat(options),
        )
        for line in corpus.describe():
            say(line)
        if options.resume:
            check_tokens(output / "tokens", corpus)
            tokenizer = load_tokenizer(output)
        else:
            tokenizer = choose_tokenizer(options, corpus, say)
            check_model(options, tokenizer, given)
            write_tokens(output / "tokens", corpus, tokenizer, context=options.context)
        _note_run(replace(run, digest=corpus.digest), tokenizer, arguments)

    in_first_process(arguments, prepare)
    return Text(load_tokenizer(output), *read_tokens(output / "tokens"))


def _note_run(run: Run, tokenizer: PreTrainedTokenizerFast, arguments: TrainingArguments) -> None:
    if not run.options.resume:
        tokenizer.save_pretrained(run.options.output)
    run.note(arguments.world_size)


def _trainer_arguments(run: Run) -> TrainingArguments:
    options = run.options
    every = options.evaluate_every or options.steps
    save = options.save_every or options.evaluate_every or max(1, options.steps // 10)
    # Trainer keeps the best model only if every save follows an evaluation
    best = save % every == 0
    checkpointing = "activation_checkpointing"  # the name since transformers 5.23
    if checkpointing not in TrainingArguments.__dataclass_fields__:
        checkpointing = "gradient_checkpointing"
    return TrainingArguments(
        output_dir=options.output,
        max_steps=options.steps,
        per_device_train_batch_size=options.batch,
        per_device_eval_batch_size=options.batch,
        gradient_accumulation_steps=options.accumulate,
        learning_rate=run.legs[0].peak,  # `LanguageModelTrainer` has the schedule
        logging_nan_inf_filter=False,
        weight_decay=options.weight_decay,
        adam_beta2=options.adam_beta2,
        max_grad_norm=options.clip,
        bf16=_uses_bf16(options),
        use_cpu=not _uses_gpu(options),
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
        dataloader_pin_memory=_uses_gpu(options),
        accelerator_config={"split_batches": False, "dispatch_batches": False},
        **{checkpointing: options.gradient_checkpointing},
    )


def _uses_gpu(options: TrainingOptions) -> bool:
    return options.device != "cpu" and torch.cuda.is_available()


def _uses_bf16(options: TrainingOptions) -> bool:
    """Whether to multiply in bf16: as the options say, else on GPUs that have such products."""
    if options.bf16 is not None:
        return options.bf16
    return _uses_gpu(options) and torch.cuda.is_bf16_supported(including_emulation=False)


def _logging_steps(steps: int, save: int) -> int:
    """Steps between two log lines: at most 10, and at most a twentieth of the run.

    It divides the steps between checkpoints, so a resumed run logs means over the same steps as one
    that was not interrupted.
    """
    return max(d for d in range(1, max(1, min(10, steps // 20)) + 1) if save % d == 0)


def _save_model(trainer: LanguageModelTrainer, output: Path) -> None:
    """Write the model to a temporary folder, then move its files to the output folder."""
    temporary = output / ".saving"
    trainer.save_model(str(temporary))
    if trainer.is_world_process_zero():
        for file in sorted(temporary.iterdir()):
            file.replace(output / file.name)
        temporary.rmdir()


@contextmanager
def explain_full_disk(output: Path) -> Iterator[None]:
    """Report a full disk in one line, and remove half-written files."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(output / ".saving", ignore_errors=True)
        if is_disk_full(error, output):
            raise ValueError(
                f"output: no space left on the disk of {output}; make room, then continue"
                " with --resume"
            ) from error
        raise


def _save_results(
    trainer: LanguageModelTrainer,
    options: TrainingOptions,
    heldout: TokenFile,
    parameters: int,
    say: Callable[[str], None],
) -> TrainingResult:
    """Save the final model, and write and report the run's results."""
    _save_model(trainer, Path(options.output))
    history = trainer.state.log_history
    evaluations = [entry for entry in history if "eval_loss" in entry]
    kept_best = (
        trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint is not None
    )
    best = min(evaluations, key=lambda e: e["eval_loss"]) if kept_best else evaluations[-1]
    tokens = len(heldout.ids) - 1
    score = Score(
        best["eval_bits_per_byte"], best["eval_loss"], tokens, heldout.text_bytes, heldout.lost
    )
    losses = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    rate = next(
        (e["train_steps_per_second"] for e in reversed(history) if "train_steps_per_second" in e),
        0.0,
    )
    rate *= options.batch * options.accumulate * options.context * trainer.args.world_size
    result = TrainingResult(options.output, losses, score, parameters, rate)
    if trainer.is_world_process_zero():
        summary = {
            "bits_per_byte": score.bits_per_byte,
            "heldout_bytes": score.text_bytes,
            "share_lost_by_tokenizer": score.lost,
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
    say(
        f"held out: {score.bits_per_byte:.4f} bits per byte over {score.text_bytes:,} bytes,"
        f" context {options.context}"
    )
    if score.note:
        say(f"held out: {score.note}")
    return result
