"""Training steps with and without: all logits at once, bf16, kept memory, oneDNN's products.

    python benchmarks/training.py            # both models
    python benchmarks/training.py --quick    # a small model, in a minute

It prints tokens/s and peak memory of a step: forward, backward, clipping and AdamW. Each
configuration runs in child processes of its own, as settings of malloc and peaks belong to a
process. They take turns, and figures are medians over the rounds. The first configuration is that
of earlier versions. All start from the same weights and tokens, and the loss of the last step is
printed too. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import cumulant
from cumulant.bench.speed.memory import peak_memory
from cumulant.kernels import product
from cumulant.malloc import keep_freed_memory
from cumulant.models import CumulantForCausalLM, from_preset

# loss: all logits, or pieces of them; malloc: system, kept (as `cumulant train`), or tunables
CONFIGURATIONS = (
    {"loss": "logits", "bf16": False, "malloc": "system", "products": "oneDNN"},
    {"loss": "logits", "bf16": False, "malloc": "system", "products": "chosen"},
    {"loss": "pieces", "bf16": False, "malloc": "system", "products": "chosen"},
    {"loss": "logits", "bf16": False, "malloc": "kept", "products": "chosen"},
    {"loss": "pieces", "bf16": False, "malloc": "kept", "products": "chosen"},
    {"loss": "pieces", "bf16": False, "malloc": "tunables", "products": "chosen"},
    {"loss": "logits", "bf16": True, "malloc": "system", "products": "chosen"},
    {"loss": "pieces", "bf16": True, "malloc": "kept", "products": "chosen"},
    {"loss": "pieces", "bf16": True, "malloc": "tunables", "products": "chosen"},
)
MODELS: dict[str, dict[str, int]] = {
    "quick": {
        "vocab_size": 2048,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "batch": 2,
        "context": 256,
    },
    # the size of `cumulant compare --recipe 20m-tokens`
    "1M parameters": {
        "vocab_size": 2048,
        "hidden_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "batch": 8,
        "context": 1024,
    },
    "12 layers of 768": {
        "vocab_size": 32000,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "batch": 1,
        "context": 512,
    },
}
TUNABLES = ":".join(
    f"glibc.malloc.{name}"
    for name in (
        "hugetlb=1",
        "mmap_threshold=4294967296",
        "trim_threshold=8589934592",
        "top_pad=268435456",
    )
)


def measure(job: dict[str, Any]) -> dict[str, float]:
    """Median seconds of a step, peak bytes and the last loss, in this process."""
    if job["malloc"] == "kept" and not keep_freed_memory():
        raise SystemExit("malloc: this C library is not glibc, or has settings of the user's")
    if job["products"] == "oneDNN":
        product.PREFERRED = True
    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    sizes = dict(MODELS[job["model"]])
    shape = sizes.pop("batch"), sizes.pop("context")
    model = CumulantForCausalLM(from_preset(job["preset"], **sizes)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    times, loss = [], torch.tensor(0.0)
    with peak_memory("cpu") as peak:
        for _ in range(job["steps"] + 1):
            # some tokens follow others, so that there is something to learn
            ids = torch.randint(100, shape).cumsum(1) % sizes["vocab_size"]
            started = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16) if job["bf16"] else nullcontext():
                loss = model(input_ids=ids, labels=ids, skip_logits=job["loss"] == "pieces").loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            times.append(time.perf_counter() - started)
        used = peak()
    return {
        "seconds": statistics.median(times[1:]),
        "peak_bytes": float(used or 0),
        "loss": loss.item(),
    }


def run_child(job: dict[str, Any]) -> dict[str, float]:
    """`measure` in a process of its own."""
    environment = {name: v for name, v in os.environ.items() if name != "GLIBC_TUNABLES"}
    if job["malloc"] == "tunables":
        environment["GLIBC_TUNABLES"] = TUNABLES
    command = [sys.executable, __file__, "--child", json.dumps(job)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr or done.stdout)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="taylor")
    parser.add_argument(
        "--quick", action="store_true", help="a small model, a few steps, one round"
    )
    parser.add_argument("--models", nargs="+", choices=list(MODELS))
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(json.loads(arguments.child))))
        return
    names = ["quick"] if arguments.quick else [name for name in MODELS if name != "quick"]
    rounds, steps = (1, 3) if arguments.quick else (arguments.rounds, arguments.steps)
    common = {"preset": arguments.preset, "steps": steps, "threads": arguments.threads}
    results: list[dict[str, Any]] = []
    for name in arguments.models or names:
        found: list[list[dict[str, float]]] = [[] for _ in CONFIGURATIONS]
        for _ in range(rounds):
            for runs, configuration in zip(found, CONFIGURATIONS, strict=True):
                runs.append(run_child({"model": name, **common, **configuration}))
        tokens = MODELS[name]["batch"] * MODELS[name]["context"]
        for runs, configuration in zip(found, CONFIGURATIONS, strict=True):
            median = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
            speeds = [tokens / run["seconds"] for run in runs]
            results.append(
                {
                    "model": name,
                    **configuration,
                    "tokens_per_second": tokens / median["seconds"],
                    "range": [min(speeds), max(speeds)],
                    "peak_mib": median["peak_bytes"] / 2**20,
                    "loss_value": median["loss"],
                }
            )
    table = Table(
        "model", "loss", "bf16", "malloc", "products", "tokens/s", "peak MiB", "last loss"
    )
    for row in results:
        table.add_row(
            row["model"],
            row["loss"],
            str(row["bf16"]),
            row["malloc"],
            row["products"],
            f"{row['tokens_per_second']:,.0f}",
            f"{row['peak_mib']:,.0f}",
            f"{row['loss_value']:.4f}",
        )
    Console().print(table)
    versions = {"cumulant": cumulant.__version__, "torch": torch.__version__}
    print(json.dumps({"rows": results, **common, "rounds": rounds, "versions": versions}))


if __name__ == "__main__":
    main()
