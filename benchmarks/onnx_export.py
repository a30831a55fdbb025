"""Exported models in onnxruntime beside the eager model: reading a prompt, and decoding.

    python benchmarks/onnx_export.py [--presets linear taylor] [--width 256] [--depth 4]

Random weights. Each preset is exported with ONNX's operators and, if it has linear or Taylor
layers, with onnxruntime's. These and the eager model's `forward` take turns: a prompt, then steps
at batch 1 that draw the likeliest token. Figures are medians over rounds, and brackets hold the
middle half. The last line is JSON. It needs the packages onnx and onnxruntime.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import quantiles
from typing import Any

import numpy as np
import onnxruntime
import torch
from rich.console import Console
from rich.table import Table

from cumulant.export import OnnxModel, export_onnx
from cumulant.models import PRESETS, CumulantForCausalLM, from_preset

VOCABULARY = 1024
Run = Callable[[np.ndarray, int], tuple[float, float]]  # seconds of the prompt and of each step


def eager(model: CumulantForCausalLM) -> Run:
    def run(ids: np.ndarray, steps: int) -> tuple[float, float]:
        x = torch.from_numpy(ids)
        start = time.perf_counter()
        out = model(x, use_cache=True, logits_to_keep=1)
        read = time.perf_counter()
        for _ in range(steps):
            token = out.logits[:, -1:].argmax(-1)
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
        return read - start, (time.perf_counter() - read) / steps

    return run


def exported(model: OnnxModel) -> Run:
    def run(ids: np.ndarray, steps: int) -> tuple[float, float]:
        model.reset(ids.shape[0])
        start = time.perf_counter()
        logits = model.read(ids)
        read = time.perf_counter()
        for _ in range(steps):
            logits = model.read(logits[:, -1:].argmax(-1))
        return read - start, (time.perf_counter() - read) / steps

    return run


def measure(runs: dict[str, Run], prompt: int, steps: int, rounds: int) -> dict[str, Any]:
    """Quartiles of the prompt's tokens/s and of the steps' tokens/s, of runs that take turns."""
    ids = np.random.default_rng(0).integers(VOCABULARY, size=(1, prompt))
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            times = run(ids, steps)
            time.sleep(0.05)  # threads of the one before come to rest
            if turn:  # the first one warms up
                found[name].append((prompt / times[0], 1 / times[1]))
    return {
        name: {
            "prompt": middle_half([x for x, _ in rates]),
            "steps": middle_half([x for _, x in rates]),
        }
        for name, rates in found.items()
    }


def middle_half(rates: list[float]) -> list[float]:
    """The first quartile, the median and the third quartile."""
    return quantiles(rates, n=4, method="inclusive")


def show(rates: Sequence[float]) -> str:
    return f"{rates[1]:,.0f} ({rates[0]:,.0f} to {rates[2]:,.0f})"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--presets", nargs="+", default=[*PRESETS], choices=[*PRESETS])
    for name, default in (("width", 256), ("depth", 4), ("heads", 4), ("prompt", 512)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in (("steps", 64), ("rounds", 7), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    onnxruntime.set_default_logger_severity(3)
    title = f"tokens/s, {options.threads} threads, prompt of {options.prompt}"
    table, rows = Table("preset", "runs", "prompt", "decoding", title=title), []
    for preset in options.presets:
        torch.manual_seed(0)
        config = from_preset(
            preset,
            vocab_size=VOCABULARY,
            hidden_size=options.width,
            num_hidden_layers=options.depth,
            num_attention_heads=options.heads,
        )
        model = CumulantForCausalLM(config).eval()
        with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
            runs = {"eager": eager(model)}
            forms = ["standard"] + ["onnxruntime"] * bool({"linear", "taylor"} & {*config.mixers})
            for operators in forms:
                place = Path(folder) / operators
                export_onnx(model, place, operators=operators)
                runs[f"ONNX, {operators}"] = exported(OnnxModel(place, options.threads))
            found = measure(runs, options.prompt, options.steps, options.rounds)
        for name, rates in found.items():
            table.add_row(preset, name, show(rates["prompt"]), show(rates["steps"]))
            rows.append({"preset": preset, "runs": name, **rates})
    Console(width=100).print(table)
    versions = {"torch": torch.__version__, "onnxruntime": onnxruntime.__version__}
    print(json.dumps({**vars(options), **versions, "tokens_per_second": rows}))


if __name__ == "__main__":
    main()
