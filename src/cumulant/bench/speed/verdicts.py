"""Sentences about measured times, if the measurements are clear enough.

The time of a cell is an interval, from the least to the greatest median of its rounds. Beside other
programs a time is only ever too long, so there the interval begins at zero. A mechanism is faster
than another if the intervals do not overlap. If they are too wide to tell, the sentence says so.
"""

from __future__ import annotations

import statistics
from itertools import product

from ..reports.folder import Row

PASSES = ("forward", "training", "decode")  # training: forward and backward; decode: one more token
BASELINE = "softmax"
SCATTER = 1.5  # greatest over least time, above which a pass tells nothing
OTHERS = 0.25  # processors that other processes use, above which times are only upper bounds
# what follows the name of a mechanism that another program computes
OTHER_PROGRAMS = {"torch": "PyTorch's operations", "onnxruntime": "onnxruntime's operators"}
CANNOT_TELL = "these measurements scatter too much to tell; close other programs"

Interval = tuple[float, float]


def measured_interval(row: Row) -> Interval:
    """The interval of the row's times, as it was measured.

    A row of an earlier version has no rounds; then it is a deviation around the median.
    """
    if "low" in row:
        return float(row["low"]), float(row["high"])
    deviation = float(row.get("deviation") or 0.0)
    return max(row["median"] - deviation, 0.0), row["median"] + deviation


def time_interval(row: Row) -> Interval:
    """The interval in which the time on a quiet machine lies, as far as the row tells."""
    low, high = measured_interval(row)
    return (0.0 if float(row.get("others", 0.0)) > OTHERS else low), high


def compared_intervals(
    rows: list[Row], kind: str, mechanism: str, other: str = BASELINE
) -> list[tuple[int, Interval, Interval]]:
    """The lengths at which both were measured, each with both intervals."""
    found = {
        (row["length"], row["mechanism"]): time_interval(row)
        for row in rows
        if row["pass"] == kind and row["status"] == "measured"
    }
    lengths = sorted(T for T, name in found if name == mechanism and (T, other) in found)
    return [(T, found[T, mechanism], found[T, other]) for T in lengths]


def overtaking_length(rows: list[Row], kind: str, mechanism: str) -> int | None:
    """The least length from which the mechanism is clearly faster than softmax.

    It is faster at all greater lengths at which both were measured.
    """
    ahead = None
    for T, (_, most), (least, _) in reversed(compared_intervals(rows, kind, mechanism)):
        if most >= least:
            break
        ahead = T
    return ahead


def answers(rows: list[Row], mechanisms: list[str]) -> list[str]:
    """The sentences of the report.

    They say, for each pass, from which length each mechanism beats softmax, and by how much at the
    greatest common length.
    """
    found = []
    for kind in PASSES:
        others = [m for m in mechanisms if m != BASELINE and compared_intervals(rows, kind, m)]
        if not others:
            continue
        if _is_scattered(rows, kind, [BASELINE, *others]):
            found.append(f"On this machine, {kind}: {CANNOT_TELL}.")
        else:
            found.append(
                f"On this machine, {kind}: {'; '.join(_verdict(rows, kind, m) for m in others)}."
            )
    found += [
        sentence
        for other, name in OTHER_PROGRAMS.items()
        for sentence in _against(other, name, rows, mechanisms)
    ]
    return found or ["Nothing to compare with softmax was measured yet."]


def _is_scattered(rows: list[Row], kind: str, mechanisms: list[str]) -> bool:
    """Whether half of a pass's cells scatter too much, or ran beside too much other work."""
    cells = [
        r
        for r in rows
        if r["pass"] == kind and r["mechanism"] in mechanisms and r["status"] == "measured"
    ]
    spreads = [high / low if low > 0 else float("inf") for low, high in map(time_interval, cells)]
    return statistics.median(spreads) > SCATTER


def _verdict(rows: list[Row], kind: str, mechanism: str) -> str:
    T, own, softmax = compared_intervals(rows, kind, mechanism)[-1]
    ahead = overtaking_length(rows, kind, mechanism)
    if ahead:
        return (
            f"{mechanism} beats softmax from T = {ahead:,} ({_speed_ratio(own, softmax)} times as"
            f" fast at {T:,})"
        )
    if own[0] > softmax[1]:
        return (
            f"{mechanism} does not beat softmax ({_speed_ratio(own, softmax)} times as fast at"
            f" {T:,})"
        )
    return f"whether {mechanism} beats softmax, {CANNOT_TELL}"


def _speed_ratio(own: Interval, other: Interval) -> str:
    """The quotient of the times as text, with the range that the intervals allow."""
    least, most = other[0] / own[1], other[1] / max(own[0], 1e-12)
    low, high = format_number(least, 2), format_number(most, 2)
    if low != high:
        return f"{low} to {high}"
    return format_number((least + most) / 2, 3)


def _against(program: str, title: str, rows: list[Row], mechanisms: list[str]) -> list[str]:
    """The speed of the mechanisms relative to another program's, "linear" to "linear, torch".

    The sentence has the least and the greatest value that the intervals of all lengths allow.
    """
    parts, unclear = [], []
    for name, kind in product((m for m in mechanisms if f"{m}, {program}" in mechanisms), PASSES):
        compared = compared_intervals(rows, kind, name, f"{name}, {program}")
        ratios = {
            T: (other[0] / own[1], other[1] / own[0])
            for T, own, other in compared
            if own[0] > 0 and other[0] > 0
        }
        if ratios and not _is_scattered(rows, kind, [name, f"{name}, {program}"]):
            least = min(ratios, key=lambda T: ratios[T][0])
            most = format_number(max(high for _, high in ratios.values()), 2)
            parts.append(
                f"{name} {kind} {format_number(ratios[least][0], 2)} (at {least:,}) to {most}"
            )
        elif compared:
            unclear.append(f"{name} {kind}")
    if unclear:
        parts.append(f"{', '.join(unclear)}: {CANNOT_TELL}")
    return [f"Times as fast as {title}: {'; '.join(parts)}."] if parts else []


def format_number(x: float, digits: int) -> str:
    """The number with significant digits, all digits before the point, and no exponent."""
    return f"{x:,.0f}" if x >= 10 ** (digits - 1) else f"{x:.{digits}g}"
