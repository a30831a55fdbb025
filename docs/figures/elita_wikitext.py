"""Draws docs/figures/elita_wikitext.svg: held-out loss by mechanism and seed.

The comparison is that of docs/log/elita.md.

    python docs/figures/elita_wikitext.py
"""

from pathlib import Path

from cumulant.bench.compare.recipes import STYLES
from cumulant.bench.reports.plots import panel_column, save_figure

# bits per byte of the held-out text after 96 steps, from seeds 0, 1 and 2
LOSSES = {
    "softmax": (2.5059, 2.5237, 2.5434),
    "elita": (2.5810, 2.5786, 2.5944),
    "elita without Q": (2.5780, 2.5748, 2.5802),
    "elita, 3 wraps": (2.5460, 2.5479, 2.5477),
    "taylor": (2.5284, 2.5381, 2.5330),
    "linear": (2.5372, 2.5459, 2.5395),
}


def main() -> None:
    figure, (panel,) = panel_column(1, height=2.4)
    for place, (name, losses) in enumerate(LOSSES.items()):
        style = {**STYLES[name].line_options(), "linestyle": ""}
        panel.plot(losses, [place] * len(losses), **style)
        mean = sum(losses) / len(losses)
        panel.plot(
            [mean, mean],
            [place - 0.3, place + 0.3],
            color=style["color"],
            linewidth=1,
        )
    panel.set_yticks(range(len(LOSSES)), LOSSES)
    panel.invert_yaxis()
    panel.set(xlabel="held-out bits per byte: three seeds and their mean")
    save_figure(figure, Path(__file__).parent, "elita_wikitext", [".svg"])


if __name__ == "__main__":
    main()
