"""`cumulant compare`: trains the mechanisms of a recipe on one text, and measures them.

Every mechanism is trained with all learning rates from the first seed, and with its best rate from
the other seeds. Then the trained models are tested on their context. Each result is a row of the
folder:

- ``text``: its size, the number of held-out tokens that are scored, and the number of steps.
- ``cost``: `step_cost.Cost` of a mechanism, and how its model differs from the baseline's.
- ``run``: ``heldout``, bits per byte of the held-out text by step.
- ``context``: of a run with the best rate, ``contexts`` (`context.Stretch`) and ``copying``
  (`context.Copying`).
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from transformers import PreTrainedTokenizerFast

from ...models import CumulantConfig, CumulantForCausalLM
from ...text.checkpoint import load_checkpoint
from ...text.corpus import Corpus, load_corpus
from ...text.options import TrainingOptions, choose_device
from ...text.runs import STARTED, checkpoints
from ...text.tokenizer import byte_tokenizer, load_tokenizer, token_sizes, train_bpe
from ...text.tokens import TokenFile, read_tokens, write_tokens
from ...text.train import Text, train
from ...text.trainer import Diverged
from ..reports.folder import Folder, Row
from ..reports.plots import pyplot
from .context import SHORTEST, loss_by_context, loss_on_copies
from .recipes import Comparison, Mechanism, configuration, differences
from .report import REPORT, report
from .results import best_rate
from .step_cost import measure_costs

SPAN = 128  # bytes of a span to copy
SCORED, SCORED_QUICKLY = 250_000, 20_000  # tokens of the held-out text, at most


def run(
    name: str,
    recipe: Comparison,
    output: str,
    *,
    scored: int = SCORED,
    device: str = "auto",
    force: bool = False,
    console: Console,
) -> Folder:
    """Train what the folder lacks, and draw the report, even after an interruption.

    The folder keeps its rows when the user asks for more learning rates or seeds. scored: tokens of
    the held-out text at most.
    """
    pyplot()  # refuses before anything is trained
    device = choose_device(device)
    corpus = load_corpus(recipe.data, heldout=recipe.heldout)
    # the text is identified by its name and digest, so its file may be moved
    identity = {"data": Path(corpus.name).name, "digest": corpus.digest}
    settings = {"recipe": name, **recipe.settings(), **identity, "device": device}
    folder = Folder.start(
        output, REPORT.command, settings, force=force, extends=("learning_rates", "seeds")
    )
    try:
        text, steps = _prepare_text(recipe, corpus, folder, scored)
        configs = {m.name: configuration(recipe, m, len(text.tokenizer)) for m in recipe.mechanisms}
        ComparisonRun(recipe, corpus, text, steps, configs, folder, device, console).run_all()
    finally:
        if any(row["row"] == "run" for row in folder.rows()):
            report(folder, console)
    return folder


def _prepare_text(
    recipe: Comparison, corpus: Corpus, folder: Folder, scored: int
) -> tuple[Text, int]:
    """The text as tokens, with the scored part of the held-out text, and the number of steps."""
    saved = folder.path / "text"
    done = next((row for row in folder.rows() if row["row"] == "text"), None)
    if done is None:
        for old in (saved, folder.path / "runs"):
            shutil.rmtree(old, ignore_errors=True)
        tokenizer = (
            train_bpe(corpus.train, recipe.vocabulary) if recipe.vocabulary else byte_tokenizer()
        )
        tokenizer.save_pretrained(saved)
        write_tokens(saved, corpus, tokenizer, context=recipe.context)
    tokenizer, (training, heldout) = load_tokenizer(saved), read_tokens(saved)
    if done is not None:
        return Text(
            tokenizer, training, _first_tokens(heldout, done["heldout_tokens"], tokenizer)
        ), int(done["steps"])
    text = Text(tokenizer, training, _first_tokens(heldout, scored, tokenizer))
    windows = (len(text.train.ids) - 1) // recipe.context
    steps = recipe.steps or int(recipe.epochs * windows / (recipe.batch * recipe.accumulate))
    if steps < 1:
        raise ValueError(
            f"data: {len(text.train.ids):,} tokens are not one step of"
            f" {recipe.batch * recipe.accumulate} x {recipe.context}; pass more text"
        )
    sizes = {"tokens": len(text.train.ids), "heldout_tokens": len(text.heldout.ids) - 1}
    sizes |= {"bytes": text.train.text_bytes, "heldout_bytes": text.heldout.text_bytes}
    folder.append({"row": "text", **sizes, "steps": steps})
    return text, steps


def _first_tokens(text: TokenFile, tokens: int, tokenizer: PreTrainedTokenizerFast) -> TokenFile:
    """The first documents of the text, the last one cut, with `tokens` tokens to predict."""
    if len(text.ids) <= tokens + 1:
        return text
    ids, starts = text.ids[: tokens + 1], text.starts[text.starts <= tokens]
    return TokenFile(ids, starts, int(token_sizes(tokenizer)[ids].sum()))


@dataclass(frozen=True)
class ComparisonRun:
    """A comparison in progress; `run_all` measures what its folder lacks."""

    recipe: Comparison
    corpus: Corpus
    text: Text
    steps: int
    configs: dict[str, CumulantConfig]
    folder: Folder
    device: str
    console: Console

    def say(self, line: str) -> None:
        self.console.print(line, highlight=False, soft_wrap=True)

    def rows_of(self, kind: str) -> list[Row]:
        return [row for row in self.folder.rows() if row["row"] == kind]

    def run_all(self) -> None:
        recipe, text = self.recipe, self.text
        self.say(
            f"{self.corpus.name}: {len(text.train.ids):,} tokens to train on,"
            f" {text.heldout.text_bytes:,} bytes held out; {self.steps:,} steps of"
            f" {recipe.step_tokens:,} tokens"
        )
        if not self.rows_of("cost"):
            self.measure_costs()
        mechanisms = {m.name: m for m in recipe.mechanisms}
        trained = {(r["mechanism"], r["learning_rate"], r["seed"]) for r in self.rows_of("run")}
        for name, rate, seed in self.runs_in_order():
            if (name, rate, seed) not in trained:
                self.train_model(mechanisms[name], rate, seed)
        tested = {(r["mechanism"], r["learning_rate"], r["seed"]) for r in self.rows_of("context")}
        best = {name: best_rate(self.rows_of("run"), name) for name in mechanisms}
        for seed in range(recipe.seeds):
            for name in mechanisms:
                key = name, best[name], seed
                checkpoint = self.run_folder(*key) / f"checkpoint-{self.steps}"
                if key not in tested and checkpoint.is_dir():  # a run that diverged has none
                    self.measure_context(*key)

    def runs_in_order(self) -> Iterator[tuple[str, float, int]]:
        """Runs (mechanism, learning rate, seed) in order: the sweep, then the other seeds.

        All mechanisms are trained before the next rate or seed, so that they can be compared at any
        time.
        """
        names = [m.name for m in self.recipe.mechanisms]
        for rate in self.recipe.learning_rates:
            for name in names:
                yield name, rate, 0
        for seed in range(1, self.recipe.seeds):
            for name in names:
                yield name, best_rate(self.rows_of("run"), name), seed

    def measure_costs(self) -> None:
        sizes = {"batch": self.recipe.batch, "context": self.recipe.context}
        found = measure_costs(self.configs, **sizes, device=self.device)
        base = self.configs[self.recipe.baseline]
        differs = {name: differences(config, base) for name, config in self.configs.items()}
        rows = (
            {"mechanism": name, "differs": differs[name], **asdict(cost)}
            for name, cost in found.items()
        )
        self.folder.append(*({"row": "cost", **row} for row in rows))

    def run_folder(self, name: str, rate: float, seed: int) -> Path:
        return (
            self.folder.path
            / "runs"
            / f"{name.replace(', ', '-').replace(' ', '-')}-{rate:g}-{seed}"
        )

    def train_model(self, mechanism: Mechanism, rate: float, seed: int) -> None:
        """Train one model, or finish an interrupted training, and write its row."""
        recipe, output = self.recipe, self.run_folder(mechanism.name, rate, seed)
        fields = {**recipe.shared, **mechanism.fields}
        options = TrainingOptions(
            str(output),
            data=recipe.data,
            heldout=recipe.heldout,
            preset=mechanism.preset,
            model_option=[f"{name}={json.dumps(value)}" for name, value in fields.items()],
            width=recipe.width,
            depth=recipe.depth,
            heads=recipe.heads,
            intermediate=self.configs[mechanism.name].intermediate_size,
            context=recipe.context,
            batch=recipe.batch,
            accumulate=recipe.accumulate,
            disjoint=True,
            steps=self.steps,
            learning_rate=rate,
            evaluate_every=-(-self.steps // recipe.evaluations),
            seed=seed,
            device=self.device,
            **recipe.training,
        )
        if (output / STARTED).is_file():
            # the digest has shown that the text is the same, though its file may have moved
            started = json.loads((output / STARTED).read_text())
            options = replace(options, data=started["data"], resume=True)
        start = time.perf_counter()
        if not (output / "result.json").is_file():
            try:
                train(options, text=self.text, say=lambda _: None)
            except Diverged as error:
                self.append_diverged(mechanism.name, rate, seed, str(error))
                return
        for past in checkpoints(output)[:-1]:
            shutil.rmtree(past)
        result = json.loads((output / "result.json").read_text())
        per_byte = result["tokens"] / result["heldout_bytes"] / math.log(2)
        heldout = [(step, nats * per_byte) for step, nats in result["heldout_losses"]]
        self.folder.append(
            {
                "row": "run",
                "mechanism": mechanism.name,
                "learning_rate": rate,
                "seed": seed,
                "parameters": result["parameters"],
                "heldout": heldout,
            }
        )
        took = f"{time.perf_counter() - start:.0f} s"
        self.say(
            f"{mechanism.name}, rate {rate:g}, seed {seed}: {heldout[-1][1]:.4f} bits per byte,"
            f" {took}"
        )

    def append_diverged(self, name: str, rate: float, seed: int, what: str) -> None:
        with torch.device("meta"):
            parameters = CumulantForCausalLM(self.configs[name]).num_parameters()
        row = {"mechanism": name, "learning_rate": rate, "seed": seed, "parameters": parameters}
        self.folder.append({"row": "run", **row, "heldout": [(self.steps, math.nan)]})
        self.say(f"{name}, rate {rate:g}, seed {seed}: {what}")

    def measure_context(self, name: str, rate: float, seed: int) -> None:
        """Measure how the trained model uses its context, and write the row."""
        recipe, text = self.recipe, self.text.heldout
        model, _ = load_checkpoint(
            str(self.run_folder(name, rate, seed) / f"checkpoint-{self.steps}"), self.device
        )
        length = recipe.reach * recipe.context
        while length > len(text.ids) - 1:
            length //= 2
        stretches = (
            loss_by_context(model, text, self.text.tokenizer, length) if length >= SHORTEST else []
        )
        distances = [d for d in self.copying_distances() if 4 * (d + SPAN) <= len(text.ids)]
        copies = (
            loss_on_copies(model, text, self.text.tokenizer, distances, span=SPAN)
            if distances
            else []
        )
        self.folder.append(
            {
                "row": "context",
                "mechanism": name,
                "learning_rate": rate,
                "seed": seed,
                "contexts": [(s.first, s.last, s.bits, s.tokens) for s in stretches],
                "copying": [(c.distance, c.second, c.control, c.span) for c in copies],
            }
        )

    def copying_distances(self) -> list[int]:
        """Distances of copied spans: an eighth of the context, doubled up to its reach."""
        found, last = [], self.recipe.context * self.recipe.reach
        distance = max(self.recipe.context // 8, 1)
        while distance <= last:
            found.append(distance)
            distance *= 2
        return found
