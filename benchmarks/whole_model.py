"""Whole models on the native kernels and on PyTorch's operators, with the same weights.

    python benchmarks/whole_model.py

It times a training step, a decoded token and a token of `generate`, and profiles the first.

Training is forward and backward on one window. Decoding is the model's step at batch 1 after a
context, and `model.generate` with sampling. Both implementations take turns, and figures are
medians. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from rich.console import Console
from rich.table import Table

import cumulant
from cumulant.models import CumulantForCausalLM, from_preset
from cumulant.ops import pointwise, step
from cumulant.text.generate import fill_cache

MATRICES = ("mkldnn::_linear_pointwise", "aten::mm", "aten::addmm", "aten::bmm")
ATTENTION = ("cumulant::attention", "cumulant::attention_backward", "GeneratedBackwardFor_cumulant")


@contextmanager
def operators(model: CumulantForCausalLM) -> Iterator[None]:
    """Use PyTorch's operators throughout."""
    before = pointwise.LEAST, step.MOST_ROWS
    mixers = [layer.mixer for layer in model.model.layers if hasattr(layer.mixer, "impl")]
    chosen = [mixer.impl for mixer in mixers]
    pointwise.LEAST, step.MOST_ROWS = 1 << 62, 0
    for mixer in mixers:
        mixer.impl = "torch"
    try:
        yield
    finally:
        pointwise.LEAST, step.MOST_ROWS = before
        for mixer, impl in zip(mixers, chosen, strict=True):
            mixer.impl = impl


def compare(
    model: CumulantForCausalLM, run: Callable[[], float], repeats: int
) -> tuple[float, float]:
    """Median milliseconds by PyTorch's operators and by the native kernels, in turns.

    `run` returns the time that it took.
    """
    times: tuple[list[float], list[float]] = [], []
    for _ in range(repeats + 1):
        with operators(model):
            times[0].append(run())
        times[1].append(run())
    return statistics.median(times[0][1:]) * 1e3, statistics.median(times[1][1:]) * 1e3


def training(model: CumulantForCausalLM, window: int) -> Callable[[], float]:
    ids = torch.randint(model.config.vocab_size, (1, window))

    def run() -> float:
        started = time.perf_counter()
        model(input_ids=ids, shift_labels=ids).loss.backward()
        took = time.perf_counter() - started
        model.zero_grad()
        return took

    return run


def decoding(model: CumulantForCausalLM, context: int, steps: int) -> Callable[[], float]:
    def run() -> float:
        cache, token, times = fill_cache(model, context), torch.zeros(1, 1, dtype=torch.long), []
        with torch.inference_mode():
            for _ in range(steps):
                started = time.perf_counter()
                token = (
                    model(input_ids=token, past_key_values=cache, use_cache=True)
                    .logits[:, -1:]
                    .argmax(-1)
                )
                times.append(time.perf_counter() - started)
        return statistics.median(times)

    return run


def generating(model: CumulantForCausalLM, tokens: int) -> Callable[[], float]:
    def run() -> float:
        started = time.perf_counter()
        model.generate(
            torch.zeros(1, 1, dtype=torch.long), max_new_tokens=tokens, do_sample=True, top_p=0.95
        )
        return (time.perf_counter() - started) / tokens

    return run


def shares(run: Callable[[], float], steps: int = 3) -> dict[str, float]:
    """Shares of a step's time: projections' products, attention kernels, everything else."""
    run()
    with torch.profiler.profile() as profile:
        for _ in range(steps):
            run()
    events = {event.key: event for event in profile.key_averages()}
    total = sum(event.self_cpu_time_total for event in events.values())
    matrices = sum(events[name].cpu_time_total for name in MATRICES if name in events)
    attention = sum(
        e.self_cpu_time_total for name, e in events.items() if name.startswith(ATTENTION)
    )
    return {
        "matrix products": matrices / total,
        "attention": attention / total,
        "the rest": 1 - (matrices + attention) / total,
    }


def build(preset: str, **options: int) -> CumulantForCausalLM:
    torch.manual_seed(0)
    return CumulantForCausalLM(from_preset(preset, **options))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="taylor")
    parser.add_argument("--window", type=int, default=4096)
    parser.add_argument("--context", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    trained = build(arguments.preset, vocab_size=257, hidden_size=256, num_hidden_layers=4).train()
    demo = build(arguments.preset, vocab_size=2048, hidden_size=192, num_hidden_layers=3).eval()
    large = build(arguments.preset, vocab_size=32000, hidden_size=768, num_hidden_layers=12).eval()
    train = training(trained, arguments.window)
    rows = {
        f"training step, width 256, T = {arguments.window}": compare(
            trained, train, arguments.repeats
        ),
        "token, width 192, vocabulary 2,048": compare(
            demo, decoding(demo, arguments.context, 100), arguments.repeats
        ),
        "token of generate(), the same model": compare(
            demo, generating(demo, 100), arguments.repeats
        ),
        "token, width 768, vocabulary 32,000": compare(
            large, decoding(large, arguments.context, 10), 3
        ),
    }
    table = Table("", "PyTorch's operators, ms", "native, ms", "ratio")
    for name, (before, after) in rows.items():
        table.add_row(name, f"{before:.2f}", f"{after:.2f}", f"{before / after:.2f}")
    profile = shares(train)
    parts = Table(*profile, title="a native training step's time")
    parts.add_row(*(f"{share:.0%}" for share in profile.values()))
    Console().print(table, parts)
    numbers = sum(p.numel() for p in large.parameters())
    speed = numbers * 4 / rows["token, width 768, vocabulary 32,000"][1] / 1e6
    print(f"the last model's {numbers / 1e6:.0f} M weights are read at {speed:.1f} GB/s")
    results = {"milliseconds": rows, "profile": profile, "gigabytes_per_second": speed}
    versions = {"cumulant": cumulant.__version__, "torch": torch.__version__}
    print(
        json.dumps(
            {
                **results,
                "preset": arguments.preset,
                "threads": arguments.threads,
                "versions": versions,
            }
        )
    )


if __name__ == "__main__":
    main()
