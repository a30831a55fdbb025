"""Associative recall: the task's distribution, the sweep, its report."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console

from cumulant.bench.recall import sweep as recall
from cumulant.bench.recall.best import best_rates
from cumulant.bench.recall.mechanisms import MECHANISMS, Setting, build_model
from cumulant.bench.recall.report import report
from cumulant.bench.recall.sweep import Sweep
from cumulant.bench.recall.task import POWER, Task
from cumulant.bench.recall.training import (
    measure_accuracy,
    parameter_groups,
    question_logits,
    state_bytes,
    train_model,
)
from cumulant.bench.redraw import redraw

TASK = Task(length=32, vocabulary=64, pairs=(2, 8))
TINY = Sweep(("softmax", "linear"), (True,), (16,), (1e-3, 1e-2), 1, 2, 32, 64, (2, 8))


def draws(task, rows, pairs, seed=0):
    return task.draw_sequences(rows, pairs, np.random.default_rng(seed))


@pytest.mark.parametrize("pairs", [2, 8])
def test_sequences(pairs):
    tokens, places, values = draws(TASK, 200, pairs)
    assert tokens.shape == (200, 32)
    keys, stated = tokens[:, : 2 * pairs : 2], tokens[:, 1 : 2 * pairs : 2]
    assert torch.equal(stated, values)
    assert int(keys.min()) >= 1
    assert int(keys.max()) < 32 <= int(values.min())
    assert int(values.max()) < 64
    assert all(len(set(row.tolist())) == pairs for row in keys)
    assert all(len(set(row.tolist())) == pairs for row in values)
    assert torch.equal(
        tokens.gather(1, places), keys
    )  # asked for each key once, in the order of the answers
    assert bool((places >= 2 * pairs).all())
    assert not bool((places % 2).any())
    rest = tokens.clone().scatter_(1, places, 0)[:, 2 * pairs :]
    assert not rest.any()


def test_early_slots_are_likelier():
    """With one key to place, slot g has probability (g + 1)^(a - 1), normalised."""
    _, places, _ = draws(replace(TASK, pairs=(1,)), 40_000, 1)
    found = np.bincount((places[:, 0].numpy() - 2) // 2, minlength=15) / 40_000
    expected = np.arange(1, 16) ** (POWER - 1.0)
    assert np.abs(found - expected / expected.sum()).max() < 0.01


def test_keys_and_values_are_uniform():
    tokens, _, values = draws(TASK, 20_000, 8)
    for drawn, first, last in (
        (tokens[:, 0], 1, 32),
        (tokens[:, 14], 1, 32),
        (values[:, 0], 32, 64),
        (values[:, 7], 32, 64),
    ):
        share = np.bincount(drawn.numpy() - first, minlength=last - first) / 20_000
        assert np.abs(share * (last - first) - 1).max() < 0.25


def test_draws_repeat_with_their_seed():
    for a, b in zip(draws(TASK, 5, 8, 3), draws(TASK, 5, 8, 3), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(draws(TASK, 5, 8, 3)[0], draws(TASK, 5, 8, 4)[0])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pairs": ()}, "pairs"),
        ({"pairs": (0,)}, "pairs"),
        ({"length": 30}, "length: expected an even number of at least 32"),
        ({"vocabulary": 16}, "vocabulary: 16 tokens hold no 8 different keys"),
    ],
)
def test_impossible_tasks(fields, message):
    with pytest.raises(ValueError, match=message):
        replace(TASK, **fields)


@pytest.mark.parametrize("conv", [True, False])
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_every_mechanism_runs(mechanism, conv):
    torch.manual_seed(0)
    model = build_model(Setting(TASK, mechanism, conv, 16, 1e-3, 0, 1)).eval()
    tokens, places, _ = draws(TASK, 3, 8)
    logits = question_logits(model, tokens, places)
    assert logits.shape == (3, 8, 64)
    whole = model(input_ids=tokens).logits
    assert torch.allclose(logits, whole.gather(1, places[..., None].expand(-1, -1, 64)), atol=1e-5)
    assert 0 <= measure_accuracy(model, TASK, 8, 0, rows=32) <= 0.5
    assert state_bytes(model, 32) > 0


def test_rebased_has_a_state_like_taylor_s():
    """Within a fifth of taylor-16's at every width of the sweep."""
    for width in Sweep().widths:
        sizes = [
            state_bytes(build_model(Setting(TASK, name, True, width, 1e-3, 0, 1)), 32)
            for name in ("rebased-16", "taylor-16")
        ]
        assert 0.8 < sizes[0] / sizes[1] < 1.2


def test_weight_decay_does_not_shorten_spans():
    model = build_model(Setting(TASK, "gated-taylor-16", True, 32, 1e-3, 0, 1))
    everything, gates = parameter_groups(model)
    assert len(gates["params"]) == 2
    assert gates["weight_decay"] == 0
    assert len(everything["params"]) + 2 == len(list(model.parameters()))


def test_a_model_learns():
    found = train_model(
        Setting(replace(TASK, pairs=(2,)), "softmax", True, 32, 1e-2, 0, 500), every=100
    )
    assert found["accuracy"]["2"] > 0.9
    assert found["steps_taken"] <= 500
    assert [point[0] for point in found["curve"]] == list(range(100, found["steps_taken"] + 1, 100))


def test_a_sweep_and_its_report(tmp_path, monkeypatch):
    console = Console(file=io.StringIO())
    output = str(tmp_path / "runs")
    folder = recall.run(TINY, output, workers=1, device="cpu", force=False, console=console)
    rows = folder.rows()
    assert len(rows) == 4
    assert {row["mechanism"] for row in rows} == {"softmax", "linear"}
    names = {
        ".lock",
        "rows.jsonl",
        "report.html",
        "report.md",
        *(f"recall_{n}.{e}" for n in ("state", "frontier", "pairs") for e in ("png", "svg")),
    }
    assert {path.name for path in folder.path.iterdir()} == names
    page = (folder.path / "report.html").read_text()

    monkeypatch.setattr(
        recall, "_train_all", lambda left, *_: pytest.fail("trained again") if left else None
    )
    recall.run(TINY, output, workers=1, device="cpu", force=False, console=console)
    for path in folder.path.iterdir():
        if path.name != "rows.jsonl":
            path.unlink()
    redraw(output, console)
    assert (folder.path / "report.html").read_text() == page
    with pytest.raises(ValueError, match="another measurement"):
        recall.run(
            replace(TINY, steps=3), output, workers=1, device="cpu", force=False, console=console
        )


def test_an_interruption_keeps_what_is_done(tmp_path, monkeypatch):
    def one(left, folder, *_):
        folder.append({**recall.asdict(left[0]), **train_model(left[0])})
        raise KeyboardInterrupt

    monkeypatch.setattr(recall, "_train_all", one)
    console = Console(file=io.StringIO())
    with pytest.raises(KeyboardInterrupt):
        recall.run(
            TINY, str(tmp_path / "runs"), workers=1, device="cpu", force=False, console=console
        )
    assert (tmp_path / "runs" / "report.html").is_file()
    assert len(recall.Folder.open(str(tmp_path / "runs")).rows()) == 1


def test_seeds_and_mechanisms_add_to_what_is_there(tmp_path, monkeypatch):
    """Every rate from the first seed, and the best of them from the others."""
    asked = []

    def invent(left, folder, *_):
        asked.append([(s.mechanism, s.learning_rate, s.seed) for s in left])
        for setting in left:
            right = (
                0.9 if (setting.learning_rate == 1e-2) == (setting.mechanism != "linear") else 0.3
            )
            found = row(setting.mechanism, setting.learning_rate, setting.seed, right)
            folder.append({**found, "conv": setting.conv, "width": setting.width})

    monkeypatch.setattr(recall, "_train_all", invent)
    first, console = [(m, x, 0) for m in TINY.mechanisms for x in (1e-3, 1e-2)], Console()
    options = {"workers": 1, "device": "cpu", "force": False, "console": console}
    recall.run(TINY, str(tmp_path), **options)
    assert asked == [first, []]
    recall.run(replace(TINY, seeds=3), str(tmp_path), **options)
    best = [("softmax", 1e-2), ("linear", 1e-3)]
    assert asked[2:] == [[], [(*each, seed) for seed in (1, 2) for each in best]]
    more = replace(TINY, seeds=3, mechanisms=(*TINY.mechanisms, "elita"))
    folder = recall.run(more, str(tmp_path), **options)
    assert asked[4:] == [
        [("elita", 1e-3, 0), ("elita", 1e-2, 0)], [("elita", 1e-2, 1), ("elita", 1e-2, 2)]
    ]  # fmt: skip
    assert [(b.mechanism, b.learning_rate, b.seeds) for b in best_rates(folder.rows())] == [
        (*each, 3) for each in (*best, ("elita", 1e-2))
    ]
    with pytest.raises(ValueError, match="another measurement"):
        recall.run(TINY, str(tmp_path), **options)


def row(mechanism, rate, seed, right, width=16, **fields):
    return {
        "mechanism": mechanism, "conv": True, "width": width, "learning_rate": rate, "seed": seed,
        "accuracy": {"2": 1.0, "8": right}, "state_bytes": 100, "parameters": 10, "seconds": 1.0,
        **fields,
    }  # fmt: skip


def test_the_best_rate_is_by_the_mean_over_whole_seeds():
    rows = [
        row("linear", 1e-3, 0, 0.5),
        row("linear", 1e-3, 1, 0.7),
        row("linear", 1e-2, 0, 0.9),
        row("linear", 1e-2, 1, 0.1),
    ]
    (found,) = best_rates(rows)
    assert found.learning_rate == 1e-3
    assert found.accuracy["8"] == pytest.approx((0.6, 0.141421), abs=1e-5)
    (found,) = best_rates([*rows, row("linear", 3e-3, 0, 1.0)])  # its second seed is not there yet
    assert found.learning_rate == 1e-3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mechanisms": ("mamba",)}, "mechanism: expected one of softmax, .*got 'mamba'"),
        ({"seeds": 0}, "seeds"),
        ({"widths": (12,)}, "width"),
        ({"learning_rates": (0.0,)}, "learning_rate"),
        ({"pairs": (100,)}, "length"),
    ],
)
def test_bad_sweeps(fields, message):
    with pytest.raises(ValueError, match=message):
        list(replace(TINY, **fields).first_settings())


def test_reports_name_the_answer_first(tmp_path):
    folder = recall.Folder.start(str(tmp_path), "recall", recall.asdict(TINY))
    for found in (row("linear", 1e-3, 0, 0.25), row("softmax", 1e-3, 0, 1.0, state_bytes=3000)):
        folder.append(found)
    assert report(folder).answer[0].endswith("softmax 100% (3 kB), linear 25% (0 kB).")
