"""`cumulant bench`: cells that are measured, skipped or too large; crossings; the report."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from cumulant.bench.redraw import redraw
from cumulant.bench.reports.folder import Folder
from cumulant.bench.speed import measure as speed
from cumulant.bench.speed import memory, subjects
from cumulant.bench.speed.recipes import FAIR, RECIPES, Recipe
from cumulant.bench.speed.subjects import SUBJECTS, Shape
from cumulant.bench.speed.verdicts import PASSES, answers, overtaking_length

TINY = Recipe(
    tuple(SUBJECTS), PASSES, (8, 16), batch=2, heads=2, dim=8, repeats=3, budget=0.01
).possible("cpu")


def run(recipe, path, force=False):
    return speed.run(
        recipe, str(path), device="cpu", threads=0, force=force, console=Console(file=io.StringIO())
    )


@pytest.mark.parametrize("name", TINY.mechanisms)
def test_subjects(name):
    """Outputs have a row for every token, and a step has one."""
    shape = Shape(2, 4, 12, 8, torch.float32, "cpu")
    torch.manual_seed(0)
    inputs = SUBJECTS[name].inputs(shape)
    out = SUBJECTS[name].run(inputs, True)
    assert out.shape[:3] in ((2, 4, 12), (2, 1, 12))
    assert out.numel() == 2 * 12 * 4 * 8
    if not name.startswith("elita") and not name.endswith("onnxruntime"):
        assert not torch.equal(SUBJECTS[name].run(inputs, False), out)
    step, held = SUBJECTS[name].step(shape)
    result = step()
    assert held > 0
    y = result[0] if isinstance(result, tuple) else result
    assert y.shape[2] == 1


def test_naive_and_fused_softmax_agree():
    inputs = SUBJECTS["softmax"].inputs(Shape(1, 2, 20, 8, torch.float64, "cpu"))
    for causal in (True, False):
        found = (SUBJECTS[name].run(inputs, causal) for name in ("softmax", "naive softmax"))
        torch.testing.assert_close(*found)


def test_a_run_and_its_report(tmp_path, monkeypatch):
    folder = run(TINY, tmp_path / "bench")
    rows = folder.rows()
    passes = sum(len(SUBJECTS[name].passes) for name in TINY.mechanisms)
    assert len(rows) == len(list(TINY.cells())) == 2 * passes
    assert all(
        row["status"] == "measured" and row["median"] > 0 and row["runs"] >= 1 for row in rows
    )
    page = (folder.path / "report.html").read_text()
    assert "On this machine, forward: " in page
    monkeypatch.setattr(speed, "_measure_cell", lambda *_: pytest.fail("measured again"))
    run(TINY, tmp_path / "bench")
    for path in folder.path.iterdir():
        if path.name != "rows.jsonl":
            path.unlink()
    redraw(str(folder.path), Console(file=io.StringIO()))
    assert (folder.path / "report.html").read_text() == page
    assert {path.suffix for path in folder.path.glob("[!.]*")} == {
        ".jsonl",
        ".html",
        ".md",
        ".png",
        ".svg",
    }


def test_too_long_and_too_large(tmp_path, monkeypatch):
    """Cells beyond the limits are rows as well, with the reason, and the run goes on."""
    monkeypatch.setattr(speed, "_run_times", lambda recipe, shape, *_: ([shape.T / 100], None))
    monkeypatch.setattr(speed, "available_bytes", lambda device: 2**20)
    recipe = Recipe(
        ("softmax", "naive softmax", "linear"),
        ("forward",),
        (100, 200, 400, 800),
        heads=1,
        seconds=5.0,
    )
    rows = {(row["length"], row["mechanism"]): row for row in run(recipe, tmp_path).rows()}
    assert rows[200, "softmax"]["status"] == "measured"  # 4 s expected
    assert rows[400, "softmax"]["status"] == "too long"  # 2 s a run there, so 8 here
    assert "8 s" in rows[400, "softmax"]["why"]
    assert rows[800, "softmax"]["status"] == "too long"
    assert rows[400, "linear"]["status"] == "measured"
    assert rows[800, "linear"]["status"] == "too long"  # twice 4 s
    assert rows[800, "naive softmax"]["status"] in ("too long", "out of memory")
    large = Recipe(("naive softmax",), ("forward",), (1024,), heads=1)
    (row,) = run(large, tmp_path / "large").rows()
    assert row["status"] == "out of memory"
    assert "GiB" in row["why"]


@pytest.mark.parametrize(
    "error", [MemoryError("no memory"), RuntimeError("can't allocate memory: you tried 1 TB")]
)
def test_running_out_is_recorded(error, tmp_path, monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setattr(speed, "_run_times", fail)
    (row,) = run(Recipe(("linear",), ("forward",), (8,)), tmp_path).rows()
    assert row["status"] == "out of memory"
    monkeypatch.setattr(
        speed, "_run_times", lambda *_: (_ for _ in ()).throw(RuntimeError("a bug"))
    )
    with pytest.raises(RuntimeError, match="a bug"):
        run(Recipe(("linear",), ("forward",), (8,)), tmp_path / "other")


def test_an_interruption_keeps_finished_rows(tmp_path, monkeypatch):
    measure = speed._measure_cell

    def second(recipe, cell, *rest, **options):
        if cell[0] == 16:
            raise KeyboardInterrupt
        return measure(recipe, cell, *rest, **options)

    monkeypatch.setattr(speed, "_measure_cell", second)
    with pytest.raises(KeyboardInterrupt):
        run(TINY, tmp_path)
    passes = sum(len(SUBJECTS[name].passes) for name in TINY.mechanisms)
    assert len(Folder.open(str(tmp_path)).rows()) == passes
    assert "Not measured yet: forward at 16; " in (tmp_path / "report.md").read_text()
    assert (tmp_path / "report.html").is_file()


def cells(mechanism, times):
    return [
        {"length": T, "pass": "forward", "mechanism": mechanism, "status": "measured", "median": t}
        for T, t in times.items()
    ]


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ({1: 2.0, 2: 2.0, 4: 3.0, 8: 4.0}, 4),
        ({1: 0.5, 2: 3.0, 4: 3.0, 8: 4.0}, 4),  # ahead once by chance, and not for good
        ({1: 0.5, 2: 1.0, 4: 1.0, 8: 1.0}, 1),
        ({1: 2.0, 2: 3.0, 4: 5.0, 8: 20.0}, None),
        ({4: 3.0, 16: 1.0}, 4),  # softmax was not measured at 16
    ],
)
def test_crossings(own, expected):
    rows = [*cells("softmax", {1: 1.0, 2: 2.0, 4: 4.0, 8: 16.0}), *cells("linear", own)]
    assert overtaking_length(rows, "forward", "linear") == expected


def test_the_answer_names_crossing_and_ratio():
    rows = [*cells("softmax", {1: 1.0, 1024: 16.0}), *cells("linear", {1: 2.0, 1024: 4.0})]
    assert answers(rows, ["softmax", "linear"]) == [
        "On this machine, forward: linear beats softmax from T = 1,024 (4 times as fast at 1,024)."
    ]
    assert (
        "does not beat"
        in answers([*rows[:2], *cells("linear", {1: 2.0, 1024: 20.0})], ["softmax", "linear"])[0]
    )


def test_implementations_stand_beside_pytorch_s():
    """The least and the most that the chosen one is ahead, with the length where it is least."""
    rows = [
        *cells("linear", {16: 2.0, 64: 2.0, 256: 2.0}),
        *cells("linear, torch", {16: 8.0, 64: 1.0, 256: 6.0}),
    ]
    assert answers(rows, ["linear", "linear, torch"]) == [
        "Times as fast as PyTorch's operations: linear forward 0.5 (at 64) to 4."
    ]
    assert all(f"{name}, torch" in RECIPES["implementations"].mechanisms for name in FAIR[1:5])


@pytest.mark.parametrize("name", [name for name in SUBJECTS if name.endswith(", torch")])
def test_a_named_implementation_is_the_one_that_runs(name, monkeypatch):
    """And without a name, the choice is `auto`'s."""
    asked = []
    mechanism = name.partition(", ")[0]
    operation = {"linear": "linear", "taylor": "taylor", "flash": "mixed_chunk", "elita": "elita"}[
        mechanism
    ]
    real = getattr(subjects, f"{operation}_attention")

    def note(*inputs, impl, **options):
        asked.append(impl)
        return real(*inputs, impl=impl, **options)

    monkeypatch.setattr(subjects, f"{operation}_attention", note)
    for subject in (name, mechanism):
        SUBJECTS[subject].run(
            SUBJECTS[subject].inputs(Shape(1, 2, 12, 8, torch.float32, "cpu")), True
        )
    assert asked == ["torch", "auto"]


def test_memory_is_measured():
    with memory.peak_memory("cpu") as peak:
        held = torch.ones(50_000_000)
        found = peak()
    del held
    assert found is None or 190e6 < found < 260e6
    assert memory.available_bytes("cpu") is None or memory.available_bytes("cpu") > 2**20


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mechanisms": ("mamba",)}, "mechanism: expected one of softmax, .*got 'mamba'"),
        ({"passes": ("sideways",)}, "pass: expected one of forward, training, decode"),
        ({"dtype": "fp8"}, "dtype: expected one of fp32"),
        ({"lengths": ()}, "length"),
        ({"lengths": (0,)}, "length"),
    ],
)
def test_bad_recipes(fields, message):
    assert RECIPES["fair"].quick().lengths == (128, 512, 2048, 8192)
    assert RECIPES["implementations"].quick().mechanisms == RECIPES["implementations"].mechanisms
    for recipe in (*RECIPES.values(), *(recipe.quick() for recipe in RECIPES.values())):
        with pytest.raises(ValueError, match=message):
            replace(recipe, **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch": 0}, "batch: expected at least 1, got 0"),
        ({"batch": -3}, "batch: expected at least 1, got -3"),
        ({"heads": 0}, "heads: expected at least 1"),
        ({"dim": 0}, "dim: expected at least 1"),
        ({"seconds": 0.0}, "seconds: expected a positive number"),
        ({"seconds": float("nan")}, "seconds: expected a positive number, got nan"),
        ({"seconds": float("inf")}, "seconds: expected a positive number, got inf"),
        ({"budget": -1.0}, "budget"),
        ({"limit": 0.0}, "limit: expected a positive number"),
        ({"repeats": 0}, "repeats"),
    ],
)
def test_numbers_that_measure_nothing(fields, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **fields)


class Clock:
    """Time that passes only while a cell is measured: its tokens in seconds, for each run."""

    def __init__(self):
        self.now, self.measured = 0.0, []

    def times(self, recipe, shape, kind, mechanism, with_memory=True):
        self.measured.append((shape.T, kind, mechanism))
        self.now += speed.RUNS * shape.T
        return [float(shape.T)], None


@pytest.mark.parametrize("limit", [100.0, 130.0, 200.0, 1000.0])
def test_a_limit_ends_the_measurement_and_names_what_is_left(limit, tmp_path, monkeypatch):
    """It is kept though runs take long, cells have all rounds or none, and the next run goes on."""
    clock = Clock()
    monkeypatch.setattr(speed.time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(speed, "_run_times", clock.times)
    recipe = Recipe(
        ("linear", "taylor"), ("forward", "decode"), (1, 2, 4, 8), seconds=99.0, budget=99.0
    )
    limited = replace(recipe, limit=limit)
    folder = run(limited, tmp_path)
    assert clock.now <= limit
    rows = [(row["length"], row["pass"], row["mechanism"]) for row in folder.rows()]
    left = [cell for cell in recipe.cells() if cell not in rows]
    assert bool(left) == (limit < 1000)
    assert {cell[:2] for cell in left}.isdisjoint(cell[:2] for cell in rows)
    page = (tmp_path / "report.md").read_text()
    assert ("Not measured yet" in page) == bool(left)
    if left:
        kind = left[-1][1]
        lengths = dict.fromkeys(str(T) for T, other, _ in left if other == kind)
        assert f"{kind} at {', '.join(lengths)}" in page
    while len(rows) < len(list(recipe.cells())):
        clock.now = 0.0
        before, rows = rows, run(limited, tmp_path).rows()
        assert len(rows) > len(before)
    assert "Not measured yet" not in (tmp_path / "report.md").read_text()


def test_quick_is_bounded_by_time():
    """Half a minute of measurements, of which a run takes a second at most."""
    for recipe in RECIPES.values():
        assert recipe.limit is None
        assert recipe.quick().limit == 30
        assert speed.RUNS * recipe.quick().seconds <= 3


def test_a_long_run_is_measured_twice():
    """So that its time is an interval too; its warm-up does not show."""
    runs = []
    recipe = Recipe(("linear",), ("forward",), (8,), budget=1e-9)
    assert len(speed._time_repeatedly(recipe, lambda: runs.append(0), "cpu")) == 2
    assert len(runs) == 2


def test_a_table_has_medians_and_intervals(tmp_path):
    """The interval is the one that verdicts compare, and the picture has it as a band."""
    folder = Folder.start(
        str(tmp_path),
        "bench",
        {"mechanisms": ["softmax", "linear"], "passes": ["forward"], "lengths": [8, 16],
         "batch": 1, "heads": 1, "dim": 8, "dtype": "fp32", "causal": True, "device": "cpu",
         "threads": 1},
    )  # fmt: skip
    for mechanism, low in (("softmax", 0.002), ("linear", 0.001)):
        for T in (8, 16):
            row = {"length": T, "pass": "forward", "mechanism": mechanism, "status": "measured"}
            folder.append({**row, "median": low * 1.2, "low": low, "high": low * 1.3})
    redraw(str(tmp_path), Console(file=io.StringIO()))
    page = (tmp_path / "report.md").read_text()
    assert "2.4 (2 to 2.6)" in page
    assert "1.2 (1 to 1.3)" in page
    assert "linear beats softmax from T = 8 (1.5 to 2.6 times as fast at 16)" in page
    assert (tmp_path / "times.svg").read_text().count("opacity: 0.2") == 2


def test_the_same_cell_is_measured_once_though_asked_for_twice():
    recipe = replace(
        TINY, mechanisms=("linear", "linear"), passes=("forward", "forward"), lengths=(8, 8)
    )
    assert list(recipe.cells()) == [(8, "forward", "linear")]
