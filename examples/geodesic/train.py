"""Trains the geodesic language model on the bytes of a text, and the same model in straight lines.

The last tenth of the text is held out. It prints each model's bits per byte, seconds a step and
peak memory; for geodesics also the curvature of the motion and the error of the integration; then
one JSON line. A minute or two on one core:

    OMP_NUM_THREADS=1 python examples/geodesic/train.py
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

# isort: split
from geometry import energy
from model import GeodesicLanguageModel

MODELS = ("straight", "geodesic")  # in this order: the peak memory of a process never falls
ROWS = 64  # rows into which the held-out text is split, which are read in parallel
FILES = (
    "argparse difflib doctest inspect mailbox optparse pickle shutil subprocess tarfile typing"
    " unittest/mock"
)


def standard_library() -> bytes:
    """About a megabyte of Python."""
    folder = Path(os.__file__).parent
    return b"".join((folder / f"{name}.py").read_bytes() for name in FILES.split())


def data(text: bytes, options: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """The training text ``[batch, N]``, in consecutive rows, and the held-out tenth ``[64, L]``."""
    heldout = len(text) // 10
    least = max(-(-options.batch * (options.context + 1) * 10 // 9), 10 * 2 * ROWS)
    if len(text) < least:
        raise ValueError(
            f"data: expected at least {least:,} bytes for this batch and context, got {len(text):,}"
        )
    ids = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    train, test = ids[: len(ids) - heldout], ids[len(ids) - heldout :]
    length = max(2, options.heldout // ROWS)
    rows = test[: heldout // ROWS * ROWS].view(ROWS, -1)[:, :length]
    return train[: len(train) // options.batch * options.batch].view(options.batch, -1), rows


def peak_mib() -> float:
    """The peak memory of the process so far."""
    # ru_maxrss is in bytes on macOS, in KiB elsewhere
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def bits_per_byte(model: GeodesicLanguageModel, rows: Tensor, window: int = 64) -> float:
    """Over all bytes of ``rows [N, L]`` except each first, with the velocity carried along."""
    nats, velocity = 0.0, None
    with torch.no_grad():
        for i in range(0, rows.shape[1] - 1, window):
            ids = rows[:, i : i + window + 1]
            logits, velocity = model(ids[:, :-1], velocity)
            nats += float(
                F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
            )
    return nats / (len(rows) * (rows.shape[1] - 1)) / math.log(2)


def motion(model: GeodesicLanguageModel, rows: Tensor) -> tuple[float, float]:
    """Medians of two ratios over the moves from all bytes of ``rows [N, L]``.

    The first is the relative change of the energy ``vᵀ g v``, which a geodesic conserves. The
    second is the distance of the end point from ``e + v``, the end of the straight line, relative
    to the line's length ``|v|``.
    """
    assert model.metric is not None
    drifts, departures = [], []
    with torch.no_grad():
        w = model.embedding.new_zeros(len(rows), model.embedding.shape[1])
        for e in model.embedding[rows].unbind(1):
            v = model.steer(e, w)
            x, w = model.move(e, v)
            drifts.append(energy(model.metric, x, w) / energy(model.metric, e, v) - 1)
            departures.append((x - e - v).norm(dim=-1) / v.norm(dim=-1))
    return float(torch.cat(drifts).abs().median()), float(torch.cat(departures).median())


def fit(name: str, train: Tensor, rows: Tensor, options: argparse.Namespace) -> dict[str, float]:
    """Train a model on ``train [B, N]``, in order; returns its scores on held-out ``rows``."""
    torch.manual_seed(options.seed)
    sizes = {"rank": options.rank, "steps": options.rk4_steps, "hidden": options.hidden}
    model = GeodesicLanguageModel(
        256, options.dim, **sizes, flat=name == "straight", checkpointing=options.checkpointing
    )
    metric = [] if model.metric is None else list(model.metric.parameters())
    rest = [p for n, p in model.named_parameters() if not n.startswith("metric.")]
    groups = [
        {"params": p, "lr": options.learning_rate * r}
        for p, r in ((rest, 1), (metric, options.metric_rate))
        if p
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    rates = [group["lr"] for group in groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rates, total_steps=options.steps, pct_start=0.1
    )
    losses, velocity, offset = [], None, 0
    start = time.perf_counter()
    for step in range(options.steps):
        if offset + options.context >= train.shape[1]:
            velocity, offset = None, 0
        ids = train[:, offset : offset + options.context + 1]
        offset += options.context
        logits, velocity = model(ids[:, :-1], velocity)
        velocity = velocity.detach()
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        if not loss.isfinite():
            raise FloatingPointError(
                f"{name}: loss not finite at step {step + 1}: lower the rates or add rk4-steps"
            )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()) / math.log(2))
    seconds = time.perf_counter() - start
    found = {
        "bits per byte": bits_per_byte(model, rows),
        "first loss, bits": losses[0],
        "last loss, bits": losses[-1],
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds a step": seconds / options.steps,
        "peak MiB": peak_mib(),
    }
    if model.metric is not None:
        found["energy drift"], found["departure"] = motion(model, rows[:, :64])
        model.metric = None
        found["bits per byte, straightened"] = bits_per_byte(model, rows)
    return found


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", help="a text; by default files of Python's standard library")
    add("--models", nargs="+", default=list(MODELS), choices=MODELS)
    add("--dim", type=int, default=32, help="dimensions of embedding space")
    add("--rank", type=int, default=4, help="of the metric's low-rank part")
    add("--hidden", type=int, default=64, help="units of the metric's network")
    add("--rk4-steps", type=int, default=1, help="integration steps a token")
    add("--batch", type=int, default=32)
    add("--context", type=int, default=32, help="tokens through which gradients flow")
    add("--steps", type=int, default=150, help="training steps")
    add("--learning-rate", type=float, default=1e-2, help="peak")
    add(
        "--metric-rate", type=float, default=0.2, help="the metric's learning rate over the others'"
    )
    add("--heldout", type=int, default=32768, help="bytes to score, at most")
    add("--seed", type=int, default=0)
    add(
        "--checkpointing",
        action="store_true",
        help="keep less for the backward pass, integrate again there",
    )
    options = parser.parse_args(arguments)
    for name in ("dim", "rank", "hidden", "rk4_steps", "batch", "context", "steps", "heldout"):
        if getattr(options, name) < 1:
            raise ValueError(
                f"{name.replace('_', '-')}: expected at least 1, got {getattr(options, name)}"
            )
    for name in ("learning_rate", "metric_rate"):
        if not 0 < getattr(options, name) < math.inf:
            raise ValueError(
                f"{name.replace('_', '-')}: expected a positive number, got"
                f" {getattr(options, name)}"
            )
    return options


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Train the requested models, print their scores, and return them by name."""
    try:
        options = parse(arguments)
        train, rows = data(
            standard_library() if options.data is None else Path(options.data).read_bytes(), options
        )
    except OSError as error:
        raise SystemExit(f"data: {error.strerror}: {error.filename}") from None
    except ValueError as error:
        raise SystemExit(str(error)) from None
    results = {}
    for name in (n for n in MODELS if n in options.models):
        try:
            found = results[name] = fit(name, train, rows, options)
        except FloatingPointError as error:
            raise SystemExit(str(error)) from None
        print(
            f"{name:<9} {found['bits per byte']:.3f} bits per byte held out  "
            f" {found['parameters']:,} parameters, {found['seconds a step']:.3f} s a step,"
            f" {found['peak MiB']:.0f} MiB peak",
            flush=True,
        )
        if "departure" in found:
            print(
                f"          {found['bits per byte, straightened']:.3f} moved in straight lines"
                f" after training   departure {100 * found['departure']:.1f}% of the way, energy"
                f" drift {100 * found['energy drift']:.2g}%"
            )
    record = {
        "options": vars(options),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    print(json.dumps({**record, "results": results}))
    return results


if __name__ == "__main__":
    main()
