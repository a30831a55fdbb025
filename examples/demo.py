"""Two minutes from nothing to a small language model of Python: train, score, sample, measure.

It trains a Taylor-attention model on the source of Python's standard library, and names the next
commands to try.
"""

from __future__ import annotations

import lzma
import math
import shutil
import time
from collections import Counter
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from cumulant.bench.commands import silence_libraries
from cumulant.cli import say
from cumulant.models import CumulantForCausalLM, cache_bytes, from_preset
from cumulant.text.checkpoint import load_checkpoint
from cumulant.text.corpus import load_corpus
from cumulant.text.generate import SamplingOptions, decoding_speed, fill_cache, generate
from cumulant.text.options import TrainingOptions
from cumulant.text.train import train

OUTPUT = "runs/demo"
OPTIONS = TrainingOptions(
    output=OUTPUT,
    preset="taylor",
    train_bpe=2048,
    width=192,
    depth=3,
    batch=4,
    steps=1000,
    device="cpu",
)


def unigram_bits(train_text: bytes, heldout: bytes) -> float:
    """Bits per byte of the held-out text under the training text's byte counts plus one."""
    counts = Counter(train_text)
    total = len(train_text) + 256
    return -sum(
        n * math.log2((counts[byte] + 1) / total) for byte, n in Counter(heldout).items()
    ) / len(heldout)


def xz_bits(heldout: bytes) -> float:
    """Bits per byte of the held-out text compressed by xz at its strongest."""
    return 8 * len(lzma.compress(heldout, preset=9 | lzma.PRESET_EXTREME)) / len(heldout)


def main() -> None:
    silence_libraries()
    started = time.perf_counter()
    console = Console()
    torch.manual_seed(0)
    corpus = load_corpus()
    heldout = b"".join(corpus.heldout)

    say("== training a Taylor-attention model on Python's standard library")
    shutil.rmtree(OUTPUT, ignore_errors=True)
    result = train(OPTIONS, say=say)

    say("\n== held-out text, bits per byte (less is better)")
    scores = Table("model", "bits per byte")
    scores.add_row("byte frequencies", f"{unigram_bits(b''.join(corpus.train), heldout):.3f}")
    scores.add_row("xz -9e on the held-out text itself", f"{xz_bits(heldout):.3f}")
    scores.add_row("this model, windows of 256 tokens", f"{result.score.bits_per_byte:.3f}")
    console.print(scores)

    say("\n== a sample")
    model, tokenizer = load_checkpoint(OUTPUT, "cpu")
    prompt = "\n\ndef __init__(self, name"
    sample = generate(model, tokenizer, prompt, SamplingOptions(200, temperature=0.5, seed=1))
    print(prompt.strip() + sample.text)

    say("\n== generation by length of context")
    softmax = CumulantForCausalLM(
        from_preset(
            "softmax",
            hidden_size=OPTIONS.width,
            num_hidden_layers=OPTIONS.depth,
            vocab_size=len(tokenizer),
        )
    ).eval()
    speeds = Table("model", "context", "tokens/s", "state or cache")
    for name, subject in (("taylor", model), ("softmax, same size", softmax)):
        for context in (1024, 32768):
            cache = fill_cache(subject, context)
            speed = decoding_speed(subject, cache)
            speeds.add_row(
                name, f"{context:,}", f"{speed:,.0f}", f"{cache_bytes(cache) / 2**20:,.2f} MiB"
            )
    console.print(speeds)

    say(f"\n{time.perf_counter() - started:.0f} seconds in all. Next:")
    folder = Path(OUTPUT)
    say(f"  .venv/bin/cumulant generate {folder} --prompt 'class ' --stats")
    say("  .venv/bin/cumulant train --data YOUR_TEXT --output runs/mine --steps 5000")
    say("  .venv/bin/cumulant train --help")


if __name__ == "__main__":
    main()
