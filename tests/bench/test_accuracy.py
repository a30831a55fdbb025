"""`cumulant bench accuracy`: rows for what can run, errors of the right size, the report."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from cumulant.bench.accuracy import measure as accuracy
from cumulant.bench.accuracy import subjects
from cumulant.bench.accuracy.measure import Settings, measure_errors
from cumulant.bench.accuracy.subjects import IMPLEMENTATIONS, OPERATIONS
from cumulant.bench.redraw import redraw

EXPECTED = {"fp32": (1e-9, 3e-6), "bf16": (1e-4, 3e-3), "fp16": (1e-5, 4e-4), "fp64": (0, 1e-14)}


@pytest.mark.parametrize("dtype", EXPECTED)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_errors_are_those_of_the_dtype(operation, dtype):
    rows = measure_errors(operation, 100, dtype, 0, "cpu")
    assert [row["implementation"] for row in rows] == list(IMPLEMENTATIONS)
    least, most = EXPECTED[dtype]
    for row in rows:
        assert least <= row["error"] <= most, row


def test_long_texts_leave_out_what_is_quadratic_or_slow(monkeypatch):
    monkeypatch.setattr(subjects, "QUADRATIC", 50)
    monkeypatch.setattr(subjects, "STEPWISE", 50)
    assert {row["implementation"] for row in measure_errors("linear", 100, "fp32", 0, "cpu")} == {
        "torch",
        "native",
    }


def test_an_error_is_seen(monkeypatch):
    """The row of an implementation shows its errors, and no other row does."""
    right = OPERATIONS["linear"]

    def wrong(q, k, v, **options):
        out = right(q, k, v, **options)
        return out + 0.01 if options.get("impl") == "torch" else out

    monkeypatch.setitem(OPERATIONS, "linear", wrong)
    for row in measure_errors("linear", 64, "fp32", 0, "cpu"):
        assert (row["error"] > 1e-3) == (row["implementation"] == "torch")


def test_a_run_and_its_report(tmp_path, monkeypatch):
    console = Console(file=io.StringIO())
    settings = Settings((16, 64), ("fp32", "bf16"), ("linear", "elita"))
    folder = accuracy.run(settings, str(tmp_path), device="cpu", force=False, console=console)
    assert len(folder.rows()) == 2 * 2 * 2 * len(IMPLEMENTATIONS)
    page = (tmp_path / "report.html").read_text()
    assert "The largest error up to 64 tokens: fp32 " in page
    monkeypatch.setattr(accuracy, "measure_errors", lambda *_: pytest.fail("measured again"))
    accuracy.run(settings, str(tmp_path), device="cpu", force=False, console=console)
    (tmp_path / "accuracy.svg").unlink()
    redraw(str(tmp_path), console)
    assert (tmp_path / "report.html").read_text() == page


@pytest.mark.parametrize(
    "fields", [{"dtypes": ("fp8",)}, {"operations": ("mamba",)}, {"lengths": (0,)}]
)
def test_bad_settings(fields):
    with pytest.raises(ValueError, match="expected"):
        replace(Settings(), **fields)
