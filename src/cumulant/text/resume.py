"""Resuming a run: its options, the changes that are allowed, and the checkpoint to start from."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from .options import TrainingOptions
from .runs import STARTED, checkpoints, newest_intact, read_object, write_json
from .schedule import Leg, plan_leg, rate_at

# options that do not affect the training
_FREE = {"output", "device", "resume", "evaluate_every", "save_every"}
_RATE = ("steps", "learning_rate", "warmup")  # a change begins a new leg of the schedule
_SHARE = ("batch", "accumulate")  # may change if the number of windows a step does not
_PATHS = ("data", "tokenizer", "init_from")


@dataclass(frozen=True)
class Run:
    """A run: its options and the legs of its schedule.

    digest: of the text, once it is known.
    start: the checkpoint to resume from.
    """

    options: TrainingOptions
    legs: list[Leg]
    digest: str | None = None
    start: Path | None = None

    @classmethod
    def new(cls, options: TrainingOptions) -> Run:
        return cls(
            options, [plan_leg(0, options.steps, 0.0, options.learning_rate, options.warmup)]
        )

    def note(self, processes: int) -> None:
        """Write to the folder what a resumed run needs to know."""
        more = {
            "legs": [asdict(leg) for leg in self.legs],
            "processes": processes,
            "digest": self.digest,
        }
        write_json(Path(self.options.output) / STARTED, {**asdict(self.options), **more})


def given_options(options: TrainingOptions) -> set[str]:
    """The names of the options that differ from their defaults."""
    return {f.name for f in fields(options) if getattr(options, f.name) != f.default}


def resume(
    options: TrainingOptions,
    given: Collection[str],
    processes: int,
    first: bool,
    say: Callable[[str], None],
) -> Run:
    """The run in ``options.output`` as it was started, with the changes among `given`.

    ``steps``, ``learning_rate`` and ``warmup`` begin a new leg at the checkpoint. ``batch`` and
    ``accumulate`` may change if their product with the number of processes does not. The other
    options must agree. The `first` process removes incomplete and damaged checkpoints, unless no
    other is left.

    Raises:
        ValueError: there is no run, it is damaged, or the options do not agree with it.
    """
    output = Path(options.output)
    if not (output / STARTED).is_file():
        raise ValueError(f"resume: there is no run in {output}; start one without --resume")
    try:
        noted = read_object(output / STARTED)
        past, legs = (
            _past_options(noted, options, given),
            [Leg(**leg) for leg in noted.get("legs", [])],
        )
    except (TypeError, ValueError) as error:
        if str(error).partition(":")[0] in given:
            raise
        raise ValueError(f"resume: {output / STARTED} is damaged: {error}") from error
    _check_unchanged(past, options, given, output)
    start = _find_start(output, first, say)
    done = int(start.name.rpartition("-")[2]) if start else 0
    shared = replace(
        past, **{name: getattr(options, name) for name in (*_SHARE, "data") if name in given}
    )
    _check_windows(noted.get("processes"), past, shared, processes)
    run = Run(shared, legs or Run.new(past).legs, noted.get("digest"), start)
    say(
        f"resuming {output} from"
        f" {start.name if start else 'the beginning: it has no whole checkpoint yet'}"
    )
    changes = {name: getattr(options, name) for name in _RATE if name in given}
    if any(getattr(past, name) != value for name, value in changes.items()):
        run = _begin_leg(run, changes, done, say)
    elif done >= past.steps:
        say(f"all {done} steps are done; --steps with a larger number lengthens the run")
    return run


def _past_options(
    noted: dict[str, Any], options: TrainingOptions, given: Collection[str]
) -> TrainingOptions:
    kept = {f.name: noted[f.name] for f in fields(TrainingOptions) if f.name in noted}
    kept |= {name: getattr(options, name) for name in _FREE if name in given}
    return TrainingOptions(**{**kept, "output": options.output, "resume": True})


def _check_unchanged(
    past: TrainingOptions, options: TrainingOptions, given: Collection[str], output: Path
) -> None:
    for name in given:
        # a text is compared by its digest
        if name in _FREE or name in _RATE or name in _SHARE or name == "data":
            continue
        before, now = getattr(past, name), getattr(options, name)
        same_path = (
            name in _PATHS and before and now and os.path.realpath(before) == os.path.realpath(now)
        )
        if before != now and not same_path:
            raise ValueError(
                f"resume: the run in {output} was started with {name}={before!r}, not {now!r}"
            )


def _find_start(output: Path, first: bool, say: Callable[[str], None]) -> Path | None:
    start, damaged = newest_intact(output)
    if damaged and start is None:
        path, what = next(iter(damaged.items()))
        raise ValueError(
            f"resume: no checkpoint in {output} is intact ({path.name}: {what}); remove them to"
            " start anew"
        )
    for path, what in damaged.items():
        say(f"{path.name} is damaged ({what}) and is removed")
    if first:
        for path in checkpoints(output):
            if path in damaged or not (path / "whole.json").is_file():
                shutil.rmtree(path)
    return start


def _check_windows(
    before: Any, past: TrainingOptions, now: TrainingOptions, processes: int
) -> None:
    """Refuse another number of windows a step; their spread over processes may change."""
    before = before if isinstance(before, int) else processes
    old, new = past.batch * past.accumulate * before, now.batch * now.accumulate * processes
    if old != new:
        raise ValueError(
            f"resume: the run took {old} windows a step (batch {past.batch}, accumulate"
            f" {past.accumulate}, processes {before}); batch {now.batch}, accumulate"
            f" {now.accumulate} and processes {processes} would take {new}; pass --batch or"
            " --accumulate so that they are as many"
        )


def _begin_leg(run: Run, changes: dict[str, Any], done: int, say: Callable[[str], None]) -> Run:
    options = replace(run.options, **changes)
    if options.steps < done:
        raise ValueError(
            f"steps: the run has done {done} steps already, got {options.steps}; pass more to"
            " lengthen it"
        )
    if options.steps == done and "steps" not in changes:
        raise ValueError(
            f"learning_rate: all {done} steps are done; pass --steps with a larger number as well"
        )
    before = [leg for leg in run.legs if leg.first < done]
    start = rate_at(before, options.schedule, done) if before else 0.0
    leg = plan_leg(done, options.steps, start, options.learning_rate, options.warmup)
    if options.schedule == "cosine":
        say(
            f"from step {done} on: the learning rate goes from {start:.2g} to {leg.peak:.2g} in"
            f" {leg.warmup} steps, then along a cosine to zero at step {leg.last}"
        )
    else:
        say(
            f"from step {done} on: learning rate {leg.peak:.2g} times min(1, 10 / sqrt(step)), to"
            f" step {leg.last}"
        )
    return replace(run, options=options, legs=[*before, leg])
