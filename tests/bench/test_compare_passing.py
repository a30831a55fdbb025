"""`cumulant compare` with some more steps in which states are passed on from window to window."""

import json
from dataclasses import replace

import pytest

from cumulant.bench.compare import work as bench
from cumulant.bench.compare.recipes import Mechanism
from cumulant.bench.reports.folder import Folder
from cumulant.text.trainer import MarkWhole

from .comparisons import key, rows, run, run_folder

pytestmark = pytest.mark.filterwarnings("ignore")
STEPS = 30


@pytest.fixture(scope="module")
def passing(recipe):
    """Softmax, whose state grows, and linear attention."""
    return replace(
        recipe,
        mechanisms=(recipe.mechanisms[0], Mechanism("linear", "linear")),
        learning_rates=(1e-2,),
        sweep=0.5,
        seeds=2,
        passing_steps=STEPS,
        passing_rate=0.5,
        reach=16,
    )


@pytest.fixture(scope="module")
def done(passing, tmp_path_factory):
    output = tmp_path_factory.mktemp("passing") / "out"
    with pytest.MonkeyPatch.context() as patch:
        options = note_options(patch)
        run(passing, output)
    return output, options


def note_options(patch):
    found, train = [], bench.train

    def noted(options, **given):
        found.append(options)
        return train(options, **given)

    patch.setattr(bench, "train", noted)
    return found


def test_models_of_fixed_states_are_trained_further_and_read_again(done, passing):
    output, options = done
    assert [key(r) for r in rows(output, "passing")] == [("linear", 1e-2, 0), ("linear", 1e-2, 1)]
    (one, _) = (o for o in options if o.carry_state == "passing")
    assert (one.steps, one.learning_rate, one.seed) == (STEPS, 5e-3, 0)
    trained = run_folder(output, "linear", 1e-2, 0)
    assert one.init_from == str(trained / f"checkpoint-{rows(output, 'text')[0]['steps']}")
    before, after = rows(output, "context"), rows(output, "passing")
    lengths = [last for _, last, _, _ in after[0]["contexts"]]
    assert lengths[-1] == 16 * passing.context
    assert lengths == [last for _, last, _, _ in before[0]["contexts"]]
    plain = next(r for r in before if key(r) == key(after[0]))
    assert plain["contexts"][-1][2] != after[0]["contexts"][-1][2]
    assert not run_folder(output, "linear", 1e-2, "0-passing").exists()


def test_the_report_tells_both(done):
    output, _ = done
    page = (output / "report.html").read_text()
    assert f"after {STEPS} steps with states passed on, from windows of 32 tokens" in page
    assert (output / "compare_passing.svg").is_file()
    settings = Folder.open(str(output)).settings
    assert settings["passing_steps"] == STEPS


@pytest.mark.slow
def test_an_interruption_goes_on(done, passing, tmp_path, monkeypatch):
    """In the midst of these steps; the result is that of an uninterrupted training."""
    output, on_end = tmp_path / "out", MarkWhole.on_save

    class Stop(Exception):
        pass

    def stop(self, args, state, control, **rest):
        on_end(self, args, state, control, **rest)
        if args.output_dir.endswith("0-passing") and state.global_step < STEPS:
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(MarkWhole, "on_save", stop)
        with pytest.raises(Stop):
            run(passing, output)
    run(passing, output)
    assert rows(output, "passing")[0]["contexts"] == rows(done[0], "passing")[0]["contexts"]


def test_folders_without_it_have_no_such_settings(recipe):
    assert not [name for name in json.dumps(recipe.settings()).split('"') if "passing" in name]
