"""Going on with a run: which options may change, and how a finished run is lengthened."""

import json
import math
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from cumulant.text.checkpoint import load_checkpoint
from cumulant.text.options import TrainingOptions
from cumulant.text.resume import resume
from cumulant.text.runs import find_damage, lock_folder, whole_checkpoints
from cumulant.text.schedule import plan_leg, rate_at
from cumulant.text.train import train

from .conftest import SMALL, losses_in

pytestmark = pytest.mark.filterwarnings("ignore")


def quiet_train(output, given=None, **options):
    return train(TrainingOptions(str(output), **options), given=given, say=lambda _: None)


def go_on(output, given=None, **options):
    return quiet_train(output, given, resume=True, **options)


@pytest.fixture(scope="module")
def short(text, tmp_path_factory):
    output = tmp_path_factory.mktemp("short") / "run"
    quiet_train(output, data=str(text), steps=20, **SMALL)
    return output


@pytest.fixture
def copy(short, tmp_path):
    shutil.copytree(short, tmp_path / "run")
    return tmp_path / "run"


def test_a_finished_run_is_lengthened(copy):
    """The rate rises from its end to the peak, then follows a cosine to 0."""
    before = json.loads((copy / "result.json").read_text())
    longer = go_on(copy, steps=60)
    assert longer.losses[: len(before["losses"])] == [tuple(pair) for pair in before["losses"]]
    assert longer.losses[-1][0] == 60
    assert longer.losses[-1][1] < before["losses"][-1][1]
    state = json.loads((copy / "checkpoint-60" / "trainer_state.json").read_text())
    rates = {
        e["step"]: e["learning_rate"]
        for e in state["log_history"]
        if "learning_rate" in e and e["step"] > 20
    }
    for step, rate in rates.items():  # the log has the rate of the step itself
        done = step - 1 - 20
        expected = (
            1e-2 * done / 4 if done < 4 else 1e-2 * (1 + math.cos(math.pi * (done - 4) / 36)) / 2
        )
        assert rate == pytest.approx(expected, rel=1e-9), step
    assert json.loads((copy / "options.json").read_text())["steps"] == 60
    assert load_checkpoint(str(copy))[0].config.use_cache is True


def test_a_lengthened_run_that_was_interrupted_goes_on_alike(copy, tmp_path):
    shutil.copytree(copy, tmp_path / "other")
    whole = go_on(copy, steps=40)
    go_on(tmp_path / "other", steps=40)
    for name in ("checkpoint-36", "checkpoint-40"):
        shutil.rmtree(tmp_path / "other" / name, ignore_errors=True)
    assert go_on(tmp_path / "other").losses == whole.losses


def test_an_option_that_was_given_counts_also_at_its_default(copy):
    with pytest.raises(
        ValueError, match="resume: the run in .* was started with width=32, not 256"
    ):
        go_on(copy, given={"width"})
    lines = []
    default = TrainingOptions(str(copy), resume=True)
    run = resume(default, {"steps"}, 1, True, lines.append)
    assert run.options.steps == 1000
    assert run.legs[-1].first == 20
    assert any("from step 20 on: the learning rate goes from" in line for line in lines)
    for name, value in (("seed", 1), ("preset", "softmax"), ("weight_decay", 0.2)):
        with pytest.raises(ValueError, match=f"was started with {name}="):
            go_on(copy, given={name}, **{name: value})


def test_steps_that_are_done_cannot_be_taken_back(copy):
    with pytest.raises(ValueError, match="steps: the run has done 20 steps already, got 10"):
        go_on(copy, steps=10)
    with pytest.raises(
        ValueError, match="all 20 steps are done; pass --steps with a larger number as well"
    ):
        go_on(copy, learning_rate=1e-3)


def test_the_windows_of_a_step_stay_as_many(copy):
    options = TrainingOptions(str(copy), resume=True)
    with pytest.raises(
        ValueError, match=r"took 4 windows a step .* processes 2 would take 8; pass --batch"
    ):
        resume(options, set(), 2, True, lambda _: None)
    assert resume(replace(options, batch=2), {"batch"}, 2, True, lambda _: None).options.batch == 2
    longer = go_on(copy, steps=30, batch=2, accumulate=2)
    assert longer.losses[-1][0] == 30
    with pytest.raises(ValueError, match="would take 8"):
        go_on(copy, batch=4, accumulate=2)


def test_a_text_that_moved_is_not_needed(text, tmp_path):
    """Its tokens are on the disk; a text that is named again must be the same."""
    moved = tmp_path / "text.txt"
    shutil.copy(text, moved)
    quiet_train(tmp_path / "run", data=str(moved), steps=4, **SMALL)
    moved.rename(tmp_path / "novel.txt")
    assert go_on(tmp_path / "run", steps=6).losses[-1][0] == 6
    assert go_on(tmp_path / "run", steps=8, data=str(tmp_path / "novel.txt")).losses[-1][0] == 8
    (tmp_path / "novel.txt").write_text("another text; " * 300)
    with pytest.raises(ValueError, match="is not the text that the run in .* was started with"):
        go_on(tmp_path / "run", steps=10, data=str(tmp_path / "novel.txt"))
    assert go_on(tmp_path / "run", steps=10).losses[-1][0] == 10


@pytest.mark.parametrize(
    "file", ["optimizer.pt", "model.safetensors", "trainer_state.json", "whole.json"]
)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(copy, file):
    newest, before = whole_checkpoints(copy)[-1], whole_checkpoints(copy)[-2]
    content = bytearray((newest / file).read_bytes())
    content[len(content) // 2] ^= 255
    (newest / file).write_bytes(content)
    assert find_damage(newest)
    assert find_damage(before) is None
    with pytest.raises(ValueError, match="checkpoint: .*checkpoint-20 is damaged"):
        load_checkpoint(str(newest))
    first = json.loads((copy / "result.json").read_text())
    lines = []
    again = train(TrainingOptions(str(copy), resume=True), say=lines.append)
    assert any("checkpoint-20 is damaged" in line for line in lines)
    assert f"resuming {copy} from checkpoint-18" in lines
    assert again.losses == [tuple(pair) for pair in first["losses"]]


def test_where_no_checkpoint_is_intact_nothing_is_removed(copy):
    for folder in whole_checkpoints(copy):
        (folder / "scheduler.pt").write_bytes(b"half")
    with pytest.raises(
        ValueError,
        match=r"resume: no checkpoint in .* is intact \(checkpoint-20: scheduler.pt has 4",
    ):
        go_on(copy)
    assert len(whole_checkpoints(copy)) == 3


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", '{"width": "abc"}', '{"legs": 3}', '{"legs": [{"a": 1}]}']
)
def test_broken_options_are_one_line(copy, content):
    (copy / "options.json").write_text(content)
    with pytest.raises(ValueError, match=r"resume: .*options.json (is damaged|cannot be read)"):
        go_on(copy)


def test_one_process_at_a_time(copy, text, tmp_path):
    lock = lock_folder(copy)
    try:
        import subprocess
        import sys

        again = [sys.executable, "-m", "cumulant", "train", "--output", str(copy), "--resume"]
        done = subprocess.run(again, capture_output=True, text=True)
    finally:
        lock.release()
    assert done.returncode == 2
    assert "another run is filling" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_what_fails_before_the_first_step_does_not_block(text, tmp_path, monkeypatch):
    from cumulant.text.trainer import LanguageModelTrainer

    def fail(*_, **__):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(LanguageModelTrainer, "training_step", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            quiet_train(tmp_path / "run", data=str(text), steps=2, **SMALL)
    assert (tmp_path / "run" / "options.json").is_file()
    assert quiet_train(tmp_path / "run", data=str(text), steps=3, **SMALL).losses[-1][0] == 3


def test_schedules():
    assert plan_leg(0, 100, 0.0, 1.0, 0.0).warmup == 0
    assert plan_leg(0, 100, 0.0, 1.0, 0.001).warmup == 1
    assert rate_at([plan_leg(0, 100, 0.0, 1.0, 0.0)], "cosine", 0) == 1.0
    legs = [plan_leg(0, 10, 0.0, 1.0, 0.2), plan_leg(10, 30, 0.0, 0.5, 0.1)]
    assert [rate_at(legs, "cosine", n) for n in (0, 1, 2, 10, 11, 12, 30)] == [
        0,
        0.5,
        1.0,
        0,
        0.25,
        0.5,
        0,
    ]
    assert rate_at(legs, "capped_inverse_sqrt", 399) == pytest.approx(0.25)


def test_without_warmup_the_first_step_has_the_whole_rate(text, tmp_path):
    quiet_train(tmp_path / "run", data=str(text), steps=3, warmup=0.0, **SMALL)
    state = json.loads((Path(tmp_path) / "run" / "checkpoint-3" / "trainer_state.json").read_text())
    assert next(e["learning_rate"] for e in state["log_history"] if e["step"] == 1) == 1e-2


COMMAND = [
    sys.executable,
    "-m",
    "cumulant",
    "train",
    "--preset",
    "linear",
    "--width",
    "32",
    "--depth",
    "2",
    "--heads",
    "2",
]
COMMAND += [
    "--context",
    "32",
    "--batch",
    "4",
    "--device",
    "cpu",
    "--steps",
    "120",
    "--save-every",
    "12",
    "--evaluate-every",
    "12",
]


@pytest.fixture(scope="module")
def uninterrupted(text, tmp_path_factory):
    """The losses of a run that nothing interrupts."""
    output = tmp_path_factory.mktemp("uninterrupted") / "run"
    command = [*COMMAND, "--data", str(text), "--output", str(output)]
    subprocess.run(command, check=True, capture_output=True)
    return losses_in(output)


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(text, uninterrupted, tmp_path, kind):
    """Losses after a kill, with a checkpoint cut short, are those of an uninterrupted run."""
    data, output = ["--data", str(text)], tmp_path / "cut"
    process = subprocess.Popen(
        [*COMMAND, *data, "--output", str(output)],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # also where the tests run in the background
    )
    deadline = time.time() + 120
    while len(whole_checkpoints(output)) < 2 and time.time() < deadline:
        time.sleep(0.01)
    process.send_signal(kind)
    _, errors = process.communicate()
    assert process.returncode == (-signal.SIGKILL if kind == signal.SIGKILL else 130)
    if kind == signal.SIGINT:
        assert b"interrupted; continue with: cumulant train --output" in errors
        assert b"Traceback" not in errors
    partial = output / "checkpoint-9999"  # as a kill in the middle of writing leaves it
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"half")
    resume = [sys.executable, "-m", "cumulant", "train", "--output", str(output), "--resume"]
    done = subprocess.run(resume, check=True, capture_output=True, text=True)
    assert "resuming" in done.stdout
    assert not partial.exists()
    assert losses_in(output) == uninterrupted


def test_resuming_checks_what_it_resumes(run, text, tmp_path):
    import shutil

    def refuses(message, **options):
        with pytest.raises(ValueError, match=message):
            train(TrainingOptions(output=str(output), resume=True, **options), say=lambda _: None)

    output = tmp_path / "copy"
    shutil.copytree(run.output, output)
    (output / "checkpoint-mine").mkdir()  # not ours
    refuses("resume: the run in .*copy was started with width=32, not 64", width=64)
    refuses(
        "resume: the run in .*copy was started with preset='taylor', not 'softmax'",
        preset="softmax",
    )
    before = text.read_text()
    text.write_text(before + "more")
    refuses(
        "data: .*text.txt is not the text that the run in .*copy was started with", data=str(text)
    )
    text.write_text(before)
    assert (output / "checkpoint-mine").is_dir()
    shutil.rmtree(output / "checkpoint-160")
    again = train(
        TrainingOptions(output=str(output), resume=True), say=lambda _: None
    )  # options come from the run
    assert again.losses == run.losses
    assert again.score.bits_per_byte == pytest.approx(run.score.bits_per_byte, rel=1e-6)


def test_default_runs_can_be_resumed(text, tmp_path):
    """A run writes ten checkpoints by default, and three are kept."""
    train(
        TrainingOptions(output=str(tmp_path / "r"), data=str(text), steps=20, **SMALL),
        say=lambda _: None,
    )
    assert [p.name for p in whole_checkpoints(tmp_path / "r")] == [
        "checkpoint-16",
        "checkpoint-18",
        "checkpoint-20",
    ]
