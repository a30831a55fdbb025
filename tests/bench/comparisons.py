"""A comparison that takes seconds, and a console that keeps its lines."""

from dataclasses import replace

from rich.console import Console

from cumulant.bench.compare import work as bench
from cumulant.bench.compare.recipes import RECIPES, Mechanism
from cumulant.bench.reports.folder import Folder

TINY = replace(
    RECIPES["elita-wikitext"],
    mechanisms=(
        Mechanism("softmax", "softmax"),
        Mechanism("elita", "elita"),
        Mechanism("elita, 2 wraps", "elita", {"wraps": 2}),
    ),
    learning_rates=(1e-3, 1e-2),
    vocabulary=300,
    width=32,
    depth=2,
    heads=2,
    parameters=40_000,
    context=32,
    batch=4,
    epochs=1.0,
    seeds=2,
    heldout=0.1,
    evaluations=3,
)
NAMES = [m.name for m in TINY.mechanisms]


class Note(Console):
    def __init__(self):
        super().__init__()
        self.lines = []

    def print(self, *parts, **_):
        self.lines.extend(str(p) for p in parts)


def run(recipe, output, **options):
    console = Note()
    bench.run("tiny", recipe, str(output), device="cpu", console=console, **options)
    return console.lines


class Enough(Exception):
    """Ends a run as soon as a test has seen enough."""


def enough(*_, **__):
    raise Enough


def rows(folder, kind):
    return [row for row in Folder.open(str(folder)).rows() if row["row"] == kind]


def key(row):
    return row["mechanism"], row["learning_rate"], row["seed"]


def count_trainings(monkeypatch):
    """A list that gets the options of every training from now on."""
    found, real = [], bench.train
    monkeypatch.setattr(
        bench, "train", lambda options, **rest: found.append(options) or real(options, **rest)
    )
    return found


def run_folder(done, name, rate, seed):
    return done / "runs" / f"{name.replace(', ', '-').replace(' ', '-')}-{rate:g}-{seed}"
