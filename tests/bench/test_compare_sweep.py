"""`cumulant compare` with rates swept in fewer steps, and mechanisms added to a folder."""

import json
import shutil
from dataclasses import replace

import pytest

from cumulant.bench.compare import work as bench
from cumulant.bench.compare.results import best_rate, results, swept_steps
from cumulant.bench.reports.folder import Folder
from cumulant.text.trainer import MarkWhole

from .comparisons import NAMES, count_trainings, key, rows, run, run_folder

pytestmark = pytest.mark.filterwarnings("ignore")
RATES, TWO = (1e-3, 1e-2), NAMES[:2]
KINDS = ("run", "context")


@pytest.fixture(scope="module")
def swept(recipe):
    """Two mechanisms, whose rates are compared in a fourth of the steps."""
    return replace(recipe, sweep=0.25).chosen(["elita"])


@pytest.fixture(scope="module")
def done(swept, tmp_path_factory):
    output = tmp_path_factory.mktemp("sweep") / "out"
    run(swept, output)
    return output


def test_rates_in_fewer_steps_then_the_best_from_all_seeds(done):
    (text,) = rows(done, "text")
    fewer = swept_steps(text["steps"], 0.25)
    assert 1 < fewer == round(text["steps"] / 4)
    assert [key(r) for r in rows(done, "sweep")] == [(m, x, 0) for x in RATES for m in TWO]
    assert [[step for step, _ in r["heldout"]] for r in rows(done, "sweep")] == [[fewer]] * 4
    best = {m: best_rate(Folder.open(str(done)).rows(), m) for m in TWO}
    assert [key(r) for r in rows(done, "run")] == [(m, best[m], s) for s in (0, 1) for m in TWO]
    assert {r["heldout"][-1][0] for r in rows(done, "run")} == {text["steps"]}
    assert [key(r) for r in rows(done, "context")] == [key(r) for r in rows(done, "run")]


def test_a_model_is_tested_as_soon_as_it_is_trained(done):
    """An interruption later loses nothing of it."""
    order = [(r["row"], *key(r)) for r in Folder.open(str(done)).rows() if r["row"] in KINDS]
    assert order[0::2] == [("run", *key(r)) for r in rows(done, "run")]
    assert order[1::2] == [("context", *key(r)) for r in rows(done, "run")]


def test_rows_alone_go_on(swept, done, tmp_path, monkeypatch):
    """A folder without tokens and models, as in a repository, gets the same tokens again."""
    output = tmp_path / "out"
    output.mkdir()
    shutil.copy(done / "rows.jsonl", output)
    trained = count_trainings(monkeypatch)
    run(swept, output)
    assert not trained
    assert rows(output, "run") == rows(done, "run")
    lines = (output / "rows.jsonl").read_text()
    shutil.rmtree(output / "text")
    tokens = rows(done, "text")[0]["tokens"]
    (output / "rows.jsonl").write_text(lines.replace(f'"tokens": {tokens},', '"tokens": 7,'))
    with pytest.raises(ValueError, match=f"the folder's rows are of 7 tokens, and .* {tokens:,}"):
        run(swept, output)


def test_a_training_of_the_sweep_is_a_whole_one(done):
    """Its learning rate falls to zero within its own steps, and it leaves no checkpoints."""
    (text,) = rows(done, "text")
    folder = run_folder(done, "elita", 1e-2, "sweep")
    options = json.loads((folder / "options.json").read_text())
    assert options["steps"] == swept_steps(text["steps"], 0.25)
    assert not list(folder.glob("checkpoint-*"))
    kept = {p.name for p in run_folder(done, *key(rows(done, "run")[0])).glob("checkpoint-*")}
    assert kept == {f"checkpoint-{text['steps']}"}


def test_the_best_rate_is_the_sweep_s(done):
    """Results of longer trainings with other rates do not count."""
    found = Folder.open(str(done)).rows()
    by_sweep = {
        m: min(
            (r["heldout"][-1][1], r["learning_rate"])
            for r in found
            if r["row"] == "sweep" and r["mechanism"] == m
        )[1]
        for m in TWO
    }
    other = {**rows(done, "run")[0], "learning_rate": 5.0, "heldout": [[1, 0.0]]}
    assert {m: best_rate([*found, other], m) for m in TWO} == by_sweep
    for result in results(found, "softmax"):
        assert (result.rate, result.final.count) == (by_sweep[result.mechanism], 2)
        assert set(result.sweep) == set(RATES)


def test_a_mechanism_without_its_best_rate_has_no_result_yet(done):
    found = Folder.open(str(done)).rows()
    assert results([r for r in found if r["row"] != "run"], "softmax") == []
    kept = [r for r in found if r["row"] != "run" or r["mechanism"] == "softmax"]
    assert [r.mechanism for r in results(kept, "softmax")] == ["softmax"]


def test_the_page_tells_how_long_the_sweep_was(done):
    (text,) = rows(done, "text")
    fewer = swept_steps(text["steps"], 0.25)
    page = (done / "report.html").read_text()
    assert f"same held-out text in trainings of {fewer} steps. ±" in page
    assert f"Held-out loss after trainings of {fewer} steps by learning rate" in page


@pytest.mark.slow
def test_an_interrupted_sweep_goes_on(swept, done, tmp_path, monkeypatch):
    """From its checkpoint, to the same end."""
    (tmp_path / "out").mkdir()
    lines = (done / "rows.jsonl").read_text().splitlines(keepends=True)
    first = next(i for i, line in enumerate(lines) if '"sweep", ' in line)
    (tmp_path / "out" / "rows.jsonl").write_text("".join(lines[: first + 1]))
    shutil.copytree(done / "text", tmp_path / "out" / "text")
    save = MarkWhole.on_save

    def stop(self, args, state, control, **rest):
        save(self, args, state, control, **rest)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MarkWhole, "on_save", stop)
        with pytest.raises(KeyboardInterrupt):
            run(swept, tmp_path / "out")
    trained = count_trainings(monkeypatch)
    run(swept, tmp_path / "out")
    assert [options.resume for options in trained] == [True] + [False] * 6
    ends = [
        {key(r): r["heldout"][-1][1] for r in rows(folder, "sweep")}
        for folder in (done, tmp_path / "out")
    ]
    assert ends[1] == pytest.approx(ends[0], abs=1e-5)


def test_mechanisms_add_to_what_is_there(recipe, swept, done, tmp_path, monkeypatch):
    """Only the new one is trained; all are timed, so that times can be compared."""
    output = tmp_path / "out"
    shutil.copytree(done, output)
    before, trained = Folder.open(str(output)).rows(), count_trainings(monkeypatch)
    run(replace(recipe, sweep=0.25), output)
    after = Folder.open(str(output)).rows()
    assert after[: len(before)] == before
    assert len(trained) == 2 + 2
    assert {r["mechanism"] for r in after[len(before) :] if r["row"] != "cost"} == {NAMES[2]}
    assert [r["mechanism"] for r in rows(output, "cost")] == [*TWO, *NAMES]
    found = results(after, "softmax")
    assert [r.mechanism for r in found] == NAMES
    assert found[0].cost == rows(output, "cost")[2]
    with pytest.raises(ValueError, match="another measurement"):
        run(swept, output)


def test_other_fields_of_a_mechanism_are_another_measurement(swept, done, monkeypatch):
    monkeypatch.setattr(bench, "train", lambda *_, **__: pytest.fail("trained"))
    changed = (swept.mechanisms[0], swept.mechanisms[1].with_fields(wraps=2))
    with pytest.raises(ValueError, match="another measurement"):
        run(replace(swept, mechanisms=changed), done)


def test_shares_that_are_none(swept):
    for share in (0.0, -0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"sweep: expected a share above 0, at most 1, got"):
            replace(swept, sweep=share)
