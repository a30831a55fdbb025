"""The effect of the constant term in the higher order transformer.

It prints the held-out bits per byte of two small language models, with and without the term.

    python benchmarks/higher_order.py [--learning-rate 2e-3]
"""

from __future__ import annotations

import argparse

from cumulant.models import PRESETS
from cumulant.text.options import TrainingOptions
from cumulant.text.train import train


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--steps", type=int, default=1000)
    options = parser.parse_args()
    for constant in (True, False):
        PRESETS["higher_order"]["taylor_constant_term"] = constant
        output = f"runs/higher_order_{'kept' if constant else 'dropped'}_{options.learning_rate:g}"
        run = TrainingOptions(
            output,
            preset="higher_order",
            intermediate=592,
            train_bpe=2048,
            width=192,
            depth=3,
            batch=4,
            steps=options.steps,
            learning_rate=options.learning_rate,
        )
        score = train(run, say=lambda line: None).score
        print(
            f"constant term {'kept' if constant else 'dropped'}: {score.bits_per_byte:.3f} bits per"
            " byte",
            flush=True,
        )


if __name__ == "__main__":
    main()
