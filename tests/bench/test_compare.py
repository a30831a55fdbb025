"""`cumulant compare`: one budget for all, figures of its runs, and nothing is lost on the way."""

import json
import math
import shutil
import statistics
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from cumulant.bench.compare import work as bench
from cumulant.bench.compare.recipes import find_recipe
from cumulant.bench.compare.results import best_rate, results
from cumulant.bench.compare.sizes import configuration
from cumulant.bench.redraw import redraw
from cumulant.bench.reports.folder import Folder
from cumulant.models import CumulantForCausalLM
from cumulant.text.checkpoint import load_checkpoint
from cumulant.text.tokens import read_tokens
from cumulant.text.trainer import MarkWhole

from .comparisons import (
    NAMES,
    TINY,
    Enough,
    Note,
    count_trainings,
    enough,
    key,
    rows,
    run,
    run_folder,
)

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def done(recipe, tmp_path_factory):
    output = tmp_path_factory.mktemp("compare") / "out"
    run(recipe, output)
    return output


def test_all_rates_from_the_first_seed_then_the_best_from_the_others(done):
    trained = rows(done, "run")
    assert [key(r) for r in trained[:6]] == [
        (name, rate, 0) for rate in (1e-3, 1e-2) for name in NAMES
    ]
    best = {}
    for name in NAMES:
        ends = {
            r["learning_rate"]: r["heldout"][-1][1] for r in trained[:6] if r["mechanism"] == name
        }
        best[name] = min(ends, key=ends.get)
    assert [key(r) for r in trained[6:]] == [(name, best[name], 1) for name in NAMES]
    assert [key(r) for r in rows(done, "context")] == [
        (name, best[name], seed) for seed in (0, 1) for name in NAMES
    ]


def test_figures_are_the_runs(done):
    """Bits per byte are those of the models left behind, on the held-out text."""
    (text,) = rows(done, "text")
    heldout = read_tokens(done / "text")[1]
    ids = torch.from_numpy(heldout.ids.astype("int64"))
    for r in rows(done, "run"):
        assert abs(r["parameters"] / 40_000 - 1) < 0.02
        model, _ = load_checkpoint(
            str(run_folder(done, *key(r)) / f"checkpoint-{text['steps']}"), "cpu"
        )
        nats = 0.0
        for start in range(0, len(ids) - 1, 32):
            piece = ids[start : start + 33]
            with torch.no_grad():
                logits = model(piece[None, :-1], use_cache=False).logits[0]
            nats += float(F.cross_entropy(logits, piece[1:], reduction="sum"))
        assert math.isclose(
            r["heldout"][-1][1], nats / math.log(2) / heldout.text_bytes, rel_tol=1e-4
        )
        assert r["heldout"][-1][0] == text["steps"]
        assert len(r["heldout"]) >= 3
        assert (
            r["heldout"][-1][1] < math.log2(300) * (len(ids) - 1) / heldout.text_bytes
        )  # it learned something


def test_the_table_is_the_rows(done):
    found = {r.mechanism: r for r in results(Folder.open(str(done)).rows(), "softmax")}
    runs = rows(done, "run")

    def ends(name):
        own = [
            r
            for r in runs
            if r["mechanism"] == name and r["learning_rate"] == best_rate(runs, name)
        ]
        return [r["heldout"][-1][1] for r in own]

    elita, base = ends("elita"), ends("softmax")
    differences = [a - b for a, b in zip(elita, base, strict=True)]
    final, difference = found["elita"].final, found["elita"].difference
    assert (final.value, final.error) == pytest.approx(
        (statistics.mean(elita), statistics.stdev(elita) / 2**0.5)
    )
    assert (difference.value, difference.error) == pytest.approx(
        (statistics.mean(differences), statistics.stdev(differences) / 2**0.5)
    )
    assert found["softmax"].difference is None
    line = next(
        x for x in (done / "report.md").read_text().splitlines() if x.startswith("| elita |")
    )
    assert f"| {statistics.mean(elita):.4f} ± {statistics.stdev(elita) / 2**0.5:.4f} |" in line
    assert f"| {statistics.mean(differences):+.4f} ± " in line
    pictures = {
        f"compare_{name}.{kind}"
        for name in ("curves", "sweep", "contexts", "copying")
        for kind in ("png", "svg")
    }
    assert {p.name for p in done.iterdir()} == pictures | {
        ".lock",
        "rows.jsonl",
        "report.html",
        "report.md",
        "runs",
        "text",
    }


def test_the_context_rows_are_the_models(done):
    """Loops over the longest windows give the same losses, which all cover the same tokens."""
    heldout = read_tokens(done / "text")[1]
    row = next(r for r in rows(done, "context") if r["mechanism"] == "softmax")
    assert [c[:2] for c in row["contexts"]] == [[16, 32], [32, 64], [64, 128]]
    assert len({c[3] for c in row["contexts"]}) == 1
    (text,) = rows(done, "text")
    model, _ = load_checkpoint(
        str(run_folder(done, *key(row)) / f"checkpoint-{text['steps']}"), "cpu"
    )
    ids = torch.from_numpy(heldout.ids.astype(np.int64))
    count = row["contexts"][0][3] // 64
    assert count == (len(ids) - 1 - 64) // 64
    scored = bytes(bench.load_tokenizer(done / "text").decode(ids[65 : 65 + count * 64]), "utf-8")
    for first, last, bits, _ in row["contexts"]:
        losses = []
        for start in range(64 - first, 64 - first + count * 64, first):
            with torch.no_grad():
                logits = model(ids[None, start : start + last], use_cache=False).logits[0, first:]
            losses.append(
                F.cross_entropy(logits, ids[start + first + 1 : start + last + 1], reduction="sum")
            )
        assert bits == pytest.approx(float(sum(losses)) / math.log(2) / len(scored), rel=1e-4)
    assert [c[0] for c in row["copying"]] == [4, 8, 16, 32, 64, 128]
    assert all(
        second > 0 and control > 0 and span > 1 for _, second, control, span in row["copying"]
    )


def test_an_epoch_is_the_text_s_windows_and_mechanisms_differ_in_nothing_else(done):
    (text,) = rows(done, "text")
    assert text["steps"] == (text["tokens"] - 1) // 32 // 4
    options = [
        json.loads((run_folder(done, name, 1e-3, 0) / "options.json").read_text())
        for name in NAMES[:2]
    ]
    differing = {key for key in options[0] if options[0][key] != options[1][key]}
    assert differing <= {"output", "preset", "model_option", "intermediate"}


def test_state_and_kept_bytes(done):
    costs = {row["mechanism"]: row for row in rows(done, "cost")}
    layers, heads, numbers = 2, 2, 16
    assert costs["elita"]["state_bytes"] == layers * (heads * (numbers + 1) * 8 + 8)
    assert costs["elita, 2 wraps"]["state_bytes"] == 2 * costs["elita"]["state_bytes"]
    assert costs["softmax"]["state_bytes"] == layers * (2 * 32 * 32 * 4 + 8)
    assert 1.5 < costs["elita, 2 wraps"]["kept_bytes"] / costs["elita"]["kept_bytes"] < 2
    assert all(row["seconds"] > 0 for row in costs.values())


def test_the_same_command_again_trains_nothing(recipe, done, monkeypatch):
    before = (done / "rows.jsonl").read_text()

    def refuse(*_, **__):
        raise AssertionError("done again")

    for name in ("train", "measure_costs", "loss_on_copies", "loss_by_context"):
        monkeypatch.setattr(bench, name, refuse)
    run(recipe, done)
    assert (done / "rows.jsonl").read_text() == before


def test_an_interrupted_comparison_goes_on(recipe, done, tmp_path, monkeypatch):
    """Only what is missing is trained, from its checkpoint and to the same end.

    The folder and the text are elsewhere by then, and the run was interrupted in its middle.
    The page still shows the finished runs.
    """
    output, elsewhere = tmp_path / "out", tmp_path / "text.txt"
    shutil.copytree(done, output)
    shutil.copy(recipe.data, elsewhere)
    lines = (output / "rows.jsonl").read_text().splitlines(keepends=True)
    ends = [i for i, line in enumerate(lines) if '"run"' in line]
    (output / "rows.jsonl").write_text("".join(lines[: ends[-2]]))
    for line in (lines[i] for i in ends[-2:]):
        shutil.rmtree(run_folder(output, *key(json.loads(line))))
    (output / "report.md").unlink()
    save = MarkWhole.on_save

    def stop(self, args, state, control, **rest):
        save(self, args, state, control, **rest)
        raise KeyboardInterrupt

    moved = replace(recipe, data=str(elsewhere))
    with monkeypatch.context() as patch:
        patch.setattr(MarkWhole, "on_save", stop)
        with pytest.raises(KeyboardInterrupt):
            run(moved, output)
    assert "| elita |" in (output / "report.md").read_text()
    assert len(rows(output, "run")) == len(rows(done, "run")) - 2
    trained = count_trainings(monkeypatch)
    run(moved, output)
    assert [(options.resume, options.seed) for options in trained] == [(True, 1), (False, 1)]
    assert ["wraps" in options.output for options in trained] == [False, True]

    def pick(folder):
        return {key(r): r["heldout"][-1][1] for r in rows(folder, "run")}

    assert pick(output) == pytest.approx(pick(done), abs=1e-5)
    assert len(rows(output, "context")) == len(rows(done, "context"))


def test_more_rates_add_to_what_is_there(recipe, done, tmp_path, monkeypatch):
    """The other seeds take a better rate as well, and no finished run is trained again."""
    output, trained = tmp_path / "out", count_trainings(monkeypatch)
    shutil.copytree(done, output)
    more = replace(recipe, learning_rates=(*recipe.learning_rates, 2e-2))
    run(more, output)
    runs = rows(output, "run")
    best = {name: best_rate(runs, name) for name in NAMES}
    assert 2e-2 in best.values()
    anew = [name for name in NAMES if best[name] == 2e-2]
    assert [(o.learning_rate, o.seed) for o in trained] == [(2e-2, 0)] * 3 + [(2e-2, 1)] * len(anew)
    found = {r.mechanism: r for r in results(Folder.open(str(output)).rows(), "softmax")}
    assert all(result.final.count == 2 and len(result.sweep) == 3 for result in found.values())
    assert {key(r) for r in rows(output, "context")} >= {
        (name, best[name], seed) for name in NAMES for seed in (0, 1)
    }
    with pytest.raises(ValueError, match="another measurement"):
        run(recipe, output)


def test_it_is_drawn_again_from_its_rows(done, tmp_path):
    (tmp_path / "rows.jsonl").write_text((done / "rows.jsonl").read_text())
    redraw(str(tmp_path), Note())
    assert (tmp_path / "report.md").read_text() == (done / "report.md").read_text()
    for name in ("curves", "sweep", "contexts", "copying"):
        assert (tmp_path / f"compare_{name}.svg").read_bytes() == (
            done / f"compare_{name}.svg"
        ).read_bytes()


def test_a_part_is_drawn_without_what_is_missing(done, tmp_path):
    """One run of the sweep is enough for a page without differences, contexts and copies."""
    lines = (done / "rows.jsonl").read_text().splitlines(keepends=True)
    first = next(i for i, line in enumerate(lines) if '"run"' in line)
    (tmp_path / "rows.jsonl").write_text("".join(lines[: first + 1]))
    redraw(str(tmp_path), Note())
    assert not (tmp_path / "compare_contexts.svg").exists()
    (tmp_path / "rows.jsonl").write_text("".join(lines[:first]))
    with pytest.raises(ValueError, match="has no finished run yet"):
        redraw(str(tmp_path), Note())


def test_where_models_differ_is_told(done):
    page = (done / "report.md").read_text()
    assert "Models differ from softmax's in: elita: feed_forward elita, " in page
    assert "elita, 2 wraps: feed_forward elita, " in page
    assert "wraps 2." in page


def test_mistakes(recipe, done, tmp_path):
    with pytest.raises(
        ValueError, match=r"recipe: expected one of long-context, 20m-tokens, .*, got 'gpt'"
    ):
        find_recipe("gpt")
    with pytest.raises(
        ValueError, match="mechanism: expected one of softmax, elita, elita, 2 wraps, got 'mamba'"
    ):
        recipe.chosen(["mamba"])
    for changed, message in (
        ({"seeds": 0}, "seeds: expected at least 1, got 0"),
        ({"epochs": 0.0}, "epochs: expected a number above 0, got 0.0"),
        ({"epochs": math.inf}, "epochs: expected a number above 0, got inf"),
        ({"steps": -1}, "steps: expected at least 1, .*, got -1"),
        (
            {"learning_rates": (1e-3, 0.0)},
            r"learning_rate: expected numbers above 0, got \[0.001, 0.0\]",
        ),
        ({"learning_rates": (1e-3, 1e-3)}, r"learning_rate: each once, got \[0.001, 0.001\]"),
        ({"learning_rates": ()}, r"learning_rate: expected numbers above 0, got \[\]"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(recipe, **changed)
    with pytest.raises(
        ValueError, match=r"elita: has .* parameters at the nearest width .* not 1,000 within 2%"
    ):
        configuration(replace(TINY, parameters=1000), TINY.mechanisms[1], 300)
    with pytest.raises(ValueError, match="data: no such file or folder: /no/such"):
        run(replace(recipe, data="/no/such"), tmp_path / "new")
    assert not (tmp_path / "new").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(
        ValueError, match="output: .*full holds something else; name another folder"
    ):
        run(recipe, tmp_path / "full")
    before = (done / "rows.jsonl").read_text()
    for other in ({"heldout": 0.2}, {"epochs": 2.0}, {"seeds": 1}):
        with pytest.raises(ValueError, match="output: .* holds the report of another measurement"):
            run(replace(recipe, **other), done)
    assert (done / "rows.jsonl").read_text() == before


def test_force_begins_anew(recipe, done, tmp_path, monkeypatch):
    """Rows and runs of the other measurement are gone."""
    output = tmp_path / "out"
    shutil.copytree(done, output)

    monkeypatch.setattr(bench, "measure_costs", enough)
    with pytest.raises(Enough):
        run(replace(recipe, seeds=3), output, force=True)
    assert [row["row"] for row in Folder.open(str(output)).rows()] == ["text"]
    assert not (output / "runs").exists()


def test_mechanisms_that_differ_by_few_parameters_start_from_the_same_weights():
    gates = find_recipe("gates")
    started = {}
    for mechanism in gates.mechanisms[:3]:
        torch.manual_seed(5)
        config = configuration(gates, mechanism, 64)
        started[mechanism.name] = CumulantForCausalLM(config).state_dict()
    plain, rotated_less, gated = started.values()
    assert plain.keys() == rotated_less.keys() < gated.keys()
    for other in (rotated_less, gated):
        assert all(torch.equal(weight, other[name]) for name, weight in plain.items())
