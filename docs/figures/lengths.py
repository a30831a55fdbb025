"""Draws docs/figures/lengths.svg: time and memory by length, from a report.

    python docs/figures/lengths.py

The rows are those of `cumulant bench` in docs/reports/bench.
"""

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import NullFormatter

from cumulant.bench.reports.palette import BLACK, BLUE, ORANGE

matplotlib.rcParams["svg.hashsalt"] = "cumulant"  # same picture, same file
matplotlib.rcParams["font.size"] = 13

HERE = Path(__file__).parent
SHOWN = {
    "softmax": ("fused softmax", BLACK),
    "linear": ("elu + 1", ORANGE),
    "taylor": ("Taylor", BLUE),
}
PANELS = {  # pass, value, title, unit
    "training": ("median", "training step, seconds", 1.0),
    "decode": ("peak_bytes", "state in generation, MiB", 2**20),
}


def measured_rows() -> list[dict[str, Any]]:
    """A row for each pass, mechanism and length."""
    lines = (
        (HERE.parent / "reports/bench/rows.jsonl").read_text().splitlines()
    )
    return [json.loads(line) for line in lines[1:]]


def main() -> None:
    figure, axes = plt.subplots(
        1, 2, figsize=(6.6, 3.1), layout="constrained"
    )
    rows = measured_rows()
    for axis, (kind, panel) in zip(axes, PANELS.items(), strict=True):
        value, title, unit = panel
        for mechanism, (label, style) in SHOWN.items():
            points = sorted(
                (row["length"], row[value] / unit)
                for row in rows
                if (row["pass"], row["mechanism"]) == (kind, mechanism)
                and row.get(value)
            )
            lengths, values = zip(*points, strict=True)
            axis.plot(lengths, values, label=label, **style.line_options())
        axis.set(xscale="log", yscale="log", title=title, xlabel="tokens")
        axis.set_xticks([1024, 16384, 262144], ["1k", "16k", "256k"])
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.grid(alpha=0.3)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper center", ncols=3, frameon=False
    )
    figure.savefig(HERE / "lengths.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
