"""`cumulant compare`: trains the mechanisms of a recipe on one text, and measures them.

Every mechanism is trained with all learning rates from the first seed, and with its best rate from
the other seeds. A recipe may compare the rates in fewer steps; then the best one is trained from
all seeds. Then the trained models are tested on their context. Each result is a row of the folder:

- ``text``: its size, the number of held-out tokens that are scored, and the number of steps.
- ``cost``: `step_cost.Cost` of a mechanism, and how its model differs from the baseline's. When
  mechanisms are added, all are timed again, and the last rows count.
- ``run``: ``heldout``, bits per byte of the held-out text by step.
- ``sweep``: the same of a shorter training, which compares learning rates.
- ``context``: of a run with the best rate, ``contexts`` (`context.Stretch`) and ``copying``
  (`context.Copying`).
- ``passing``: ``contexts`` of the same model after some more steps with states passed on.
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

from ...models import CumulantConfig, CumulantForCausalLM
from ...text.checkpoint import load_checkpoint
from ...text.corpus import Corpus, load_corpus
from ...text.options import TrainingOptions, choose_device
from ...text.runs import STARTED, checkpoints
from ...text.tokenizer import byte_tokenizer, load_tokenizer, train_bpe
from ...text.tokens import first_tokens, read_tokens, write_tokens
from ...text.train import Text, train
from ...text.trainer import Diverged
from ..reports.folder import Folder, Row
from ..reports.plots import pyplot
from .context import SHORTEST, loss_by_context, loss_on_copies
from .recipes import Comparison, Mechanism
from .report import REPORT, report
from .results import best_rate, results, swept_steps
from .sizes import configuration, differences
from .step_cost import measure_costs

SPAN = 128  # bytes of a span to copy
FARTHEST_COPY = 4  # times the training length, since a copy takes 64 windows
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

    The folder keeps its rows when the user asks for more mechanisms, learning rates or seeds.
    scored: tokens of the held-out text at most.
    """
    pyplot()  # refuses before anything is trained
    device = choose_device(device)
    corpus = load_corpus(recipe.data, heldout=recipe.heldout)
    # the text is identified by its name and digest, so its file may be moved
    identity = {"data": Path(corpus.name).name, "digest": corpus.digest}
    settings = {"recipe": name, **recipe.settings(), **identity, "device": device}
    extends = ("mechanisms", "learning_rates", "seeds")
    folder = Folder.start(output, REPORT.command, settings, force=force, extends=extends)
    try:
        text, steps = _prepare_text(recipe, corpus, folder, scored)
        configs = {m.name: configuration(recipe, m, len(text.tokenizer)) for m in recipe.mechanisms}
        ComparisonRun(recipe, corpus, text, steps, configs, folder, device, console).run_all()
    finally:
        if results(folder.rows(), recipe.baseline):
            report(folder, console)
    return folder


def _prepare_text(
    recipe: Comparison, corpus: Corpus, folder: Folder, scored: int
) -> tuple[Text, int]:
    """The text as tokens, with the scored part of the held-out text, and the number of steps.

    A folder that has its rows but no tokens, as those in a repository, gets the same tokens again.
    """
    saved = folder.path / "text"
    done = next((row for row in folder.rows() if row["row"] == "text"), None)
    if done is None:
        shutil.rmtree(folder.path / "runs", ignore_errors=True)
    if done is None or not saved.is_dir():
        shutil.rmtree(saved, ignore_errors=True)
        tokenizer = (
            train_bpe(corpus.train, recipe.vocabulary) if recipe.vocabulary else byte_tokenizer()
        )
        tokenizer.save_pretrained(saved)
        write_tokens(saved, corpus, tokenizer, context=recipe.context)
    tokenizer, (training, heldout) = load_tokenizer(saved), read_tokens(saved)
    if done is not None:
        if len(training.ids) != done["tokens"]:
            raise ValueError(
                f"data: the folder's rows are of {done['tokens']:,} tokens, and this version of"
                f" tokenizers makes {len(training.ids):,} of the text; begin a new folder"
            )
        return Text(
            tokenizer, training, first_tokens(heldout, done["heldout_tokens"], tokenizer)
        ), int(done["steps"])
    text = Text(tokenizer, training, first_tokens(heldout, scored, tokenizer))
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


@dataclass(frozen=True)
class Run:
    """One training, "run" or "sweep"; or what follows on its model, "context" or "passing"."""

    kind: str
    mechanism: str
    learning_rate: float
    seed: int

    def row(self) -> Row:
        named = asdict(self)
        return {"row": named.pop("kind"), **named}

    def describe(self) -> str:
        part = "sweep" if self.kind == "sweep" else f"seed {self.seed}"
        return f"{self.mechanism}, rate {self.learning_rate:g}, {part}"


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
        mechanisms = {m.name: m for m in recipe.mechanisms}
        if not mechanisms.keys() <= {row["mechanism"] for row in self.rows_of("cost")}:
            self.measure_costs()
        for run in self.runs_in_order():
            if run not in self.finished(run.kind):
                self.train_model(mechanisms[run.mechanism], run)
            if run.kind == "run" and recipe.sweep < 1:  # its rate is known to be the best
                self.test_model(run)
        for seed in range(recipe.seeds):
            for name in mechanisms:
                self.test_model(Run("run", name, self.best_rate(name), seed))

    def test_model(self, run: Run) -> None:
        """Measure the context of a trained model, unless that is done."""
        test, passing = replace(run, kind="context"), replace(run, kind="passing")
        if not self.checkpoint(run).is_dir():  # of a run that diverged
            return
        if test not in self.finished("context"):
            self.measure_context(test)
        grows = "full_attention" in self.configs[run.mechanism].layer_types
        if self.recipe.passing_steps and not grows and passing not in self.finished("passing"):
            self.pass_states(passing)

    def checkpoint(self, run: Run) -> Path:
        """The trained model of a run."""
        return self.run_folder(replace(run, kind="run")) / f"checkpoint-{self.steps}"

    def finished(self, kind: str) -> set[Run]:
        """The runs that have a row of this kind."""
        return {
            Run(kind, row["mechanism"], row["learning_rate"], row["seed"])
            for row in self.rows_of(kind)
        }

    def best_rate(self, name: str) -> float:
        return best_rate(self.folder.rows(), name)

    def runs_in_order(self) -> Iterator[Run]:
        """The sweep, then the best rate from the seeds that it left.

        All mechanisms are trained before the next rate or seed, so that they can be compared at any
        time.
        """
        names, shorter = [m.name for m in self.recipe.mechanisms], self.recipe.sweep < 1
        for rate in self.recipe.learning_rates:
            for name in names:
                yield Run("sweep" if shorter else "run", name, rate, 0)
        for seed in range(0 if shorter else 1, self.recipe.seeds):
            for name in names:
                yield Run("run", name, self.best_rate(name), seed)

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

    def run_folder(self, run: Run) -> Path:
        name = run.mechanism.replace(", ", "-").replace(" ", "-")
        last = {"sweep": "sweep", "passing": f"{run.seed}-passing"}.get(run.kind, run.seed)
        return self.folder.path / "runs" / f"{name}-{run.learning_rate:g}-{last}"

    def training_options(self, mechanism: Mechanism, run: Run) -> TrainingOptions:
        """The options of a training, new or begun before."""
        recipe, output = self.recipe, self.run_folder(run)
        fields, swept = {**recipe.shared, **mechanism.fields}, run.kind == "sweep"
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
            steps=swept_steps(self.steps, recipe.sweep) if swept else self.steps,
            learning_rate=run.learning_rate,
            evaluate_every=0 if swept else -(-self.steps // recipe.evaluations),
            seed=run.seed,
            device=self.device,
            **recipe.training,
        )
        if (output / STARTED).is_file():
            # the digest has shown that the text is the same, though its file may have moved
            started = json.loads((output / STARTED).read_text())
            options = replace(options, data=started["data"], resume=True)
        return options

    def train_model(self, mechanism: Mechanism, run: Run) -> None:
        """Train one model, or finish an interrupted training, and write its row.

        Only the last checkpoint stays, and none of a shorter training.
        """
        output, options = self.run_folder(run), self.training_options(mechanism, run)
        start = time.perf_counter()
        if not (output / "result.json").is_file():
            try:
                train(options, text=self.text, say=lambda _: None)
            except Diverged as error:
                self.append_diverged(run, options.steps, str(error))
                return
        for past in checkpoints(output)[: None if run.kind == "sweep" else -1]:
            shutil.rmtree(past)
        result = json.loads((output / "result.json").read_text())
        per_byte = result["tokens"] / result["heldout_bytes"] / math.log(2)
        heldout = [(step, nats * per_byte) for step, nats in result["heldout_losses"]]
        self.folder.append({**run.row(), "parameters": result["parameters"], "heldout": heldout})
        took = f"{time.perf_counter() - start:.0f} s"
        self.say(f"{run.describe()}: {heldout[-1][1]:.4f} bits per byte, {took}")

    def append_diverged(self, run: Run, steps: int, what: str) -> None:
        with torch.device("meta"):
            parameters = CumulantForCausalLM(self.configs[run.mechanism]).num_parameters()
        heldout = [(steps, math.nan)]
        self.folder.append({**run.row(), "parameters": parameters, "heldout": heldout})
        self.say(f"{run.describe()}: {what}")

    def measure_context(self, run: Run) -> None:
        """Measure how the trained model uses its context, and write the row."""
        text = self.text.heldout
        model, _ = load_checkpoint(str(self.checkpoint(run)), self.device)
        distances = [d for d in self.copying_distances() if 4 * (d + SPAN) <= len(text.ids)]
        copies = (
            loss_on_copies(model, text, self.text.tokenizer, distances, span=SPAN)
            if distances
            else []
        )
        self.folder.append(
            {
                **run.row(),
                "contexts": self.contexts_of(model),
                "copying": [(c.distance, c.second, c.control, c.span) for c in copies],
            }
        )

    def contexts_of(self, model: CumulantForCausalLM) -> list[tuple[int, int, float, int]]:
        """The model's loss in windows of up to `reach` times the training length."""
        text, length = self.text.heldout, self.recipe.reach * self.recipe.context
        while length > len(text.ids) - 1:
            length //= 2
        found = (
            loss_by_context(model, text, self.text.tokenizer, length) if length >= SHORTEST else []
        )
        return [(s.first, s.last, s.bits, s.tokens) for s in found]

    def pass_states(self, run: Run) -> None:
        """Train a model further with states passed on, and write the row of its contexts."""
        recipe, output = self.recipe, self.run_folder(run)
        options = TrainingOptions(
            str(output),
            data=recipe.data,
            heldout=recipe.heldout,
            init_from=str(self.checkpoint(run)),
            context=recipe.context,
            batch=recipe.batch,
            accumulate=recipe.accumulate,
            disjoint=True,
            carry_state="passing",
            steps=recipe.passing_steps,
            learning_rate=run.learning_rate * recipe.passing_rate,
            seed=run.seed,
            device=self.device,
            **recipe.training,
        )
        if (output / STARTED).is_file():
            started = json.loads((output / STARTED).read_text())
            options = replace(options, data=started["data"], resume=True)
        if not (output / "result.json").is_file():
            train(options, text=self.text, say=lambda _: None)
        model, _ = load_checkpoint(str(output), self.device)
        self.folder.append({**run.row(), "contexts": self.contexts_of(model)})
        shutil.rmtree(output)
        self.say(f"{run.describe()}: states passed on")

    def copying_distances(self) -> list[int]:
        """Distances of copied spans: an eighth of the context, doubled up to 4 times of it."""
        found, last = [], self.recipe.context * min(self.recipe.reach, FARTHEST_COPY)
        distance = max(self.recipe.context // 8, 1)
        while distance <= last:
            found.append(distance)
            distance *= 2
        return found
