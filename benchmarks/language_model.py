"""Speed of whole models, preset beside preset.

It measures training by window; and decoding, with the cache's size, by context.

    python benchmarks/language_model.py train  --windows 1024 4096 16384
    python benchmarks/language_model.py decode --contexts 1000 10000 100000

All rows are measured in one process, with the presets side by side at each length. Figures are
medians over repeats. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

import cumulant
from cumulant.models import PRESETS, CumulantForCausalLM, cache_bytes, from_preset
from cumulant.text.generate import decoding_speed, fill_cache


def build(preset: str, width: int, depth: int) -> CumulantForCausalLM:
    torch.manual_seed(0)
    return CumulantForCausalLM(
        from_preset(preset, vocab_size=257, hidden_size=width, num_hidden_layers=depth)
    )


def training_speed(model: CumulantForCausalLM, window: int, repeats: int) -> float:
    """Tokens/s of forward and backward on one window."""
    model.train()
    times = []
    for _ in range(repeats + 1):
        ids = torch.randint(257, (1, window))
        started = time.perf_counter()
        model(input_ids=ids, shift_labels=ids).loss.backward()
        model.zero_grad()
        times.append(time.perf_counter() - started)
    return window / statistics.median(times[1:])


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for length in arguments.windows if arguments.what == "train" else arguments.contexts:
        for preset in arguments.presets:
            model = build(preset, arguments.width, arguments.depth)
            if arguments.what == "train":
                rows.append(
                    {
                        "preset": preset,
                        "window": length,
                        "tokens_per_second": training_speed(model, length, arguments.repeats),
                    }
                )
            else:
                cache = fill_cache(model.eval(), length)
                size = cache_bytes(cache)
                speed = decoding_speed(model, cache, 20 * arguments.repeats)
                rows.append(
                    {
                        "preset": preset,
                        "context": length,
                        "tokens_per_second": speed,
                        "cache_bytes": size,
                    }
                )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["train", "decode"])
    parser.add_argument("--presets", nargs="+", default=list(PRESETS), choices=list(PRESETS))
    parser.add_argument("--windows", nargs="+", type=int, default=[1024, 4096, 16384])
    parser.add_argument("--contexts", nargs="+", type=int, default=[1000, 10000, 100000])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = run(arguments)
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*(f"{v:,.0f}" if isinstance(v, int | float) else v for v in row.values()))
    Console().print(table)
    versions = {
        "cumulant": cumulant.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    machine = {
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
    }
    print(
        json.dumps({"what": arguments.what, "rows": rows, "versions": versions, "machine": machine})
    )


if __name__ == "__main__":
    main()
