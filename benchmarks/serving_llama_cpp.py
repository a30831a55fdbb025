"""`cumulant serve` beside llama-cpp-python's server, each with a model of the same size.

    python benchmarks/serving_llama_cpp.py --llama-python PYTHON [--width 768] [--depth 12]

PYTHON is an interpreter with llama-cpp-python[server], gguf and numpy. Both servers get the same
prompts over loopback, texts of random letters, each a token of one byte. The weights are random,
fp32 on both sides, and the presets are those of our models. For each server: the first token of a
long prompt, of the same prompt again, of a further turn, and of further turns of two conversations
in turn; then tokens per second of several clients at once. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import socket
import string
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from against_llama_cpp import THEIRS, export
from rich.console import Console
from rich.table import Table

from cumulant.text.tokenizer import byte_tokenizer
from serving import ask, start

TURNS = ("first", "again", "second turn", "others in turn")


def text(seed: int, length: int) -> str:
    return "".join(random.Random(seed).choices(string.ascii_lowercase, k=length))


async def turns(port: int, length: int, more: dict[str, Any]) -> dict[str, float]:
    """Milliseconds to the first token."""
    a, b = text(1, length), text(2, length)
    found = {}
    for name, prompt in (("first", a), ("again", a), ("second turn", a + text(3, 40))):
        found[name] = 1e3 * (await ask(port, prompt, 1, **more))["times"][0]
    await ask(port, b, 1, **more)
    times = []
    for i in range(4, 8):  # further turns of two conversations
        prompt = (a, b)[i % 2] + text(i, 40)
        times.append(1e3 * (await ask(port, prompt, 1, **more))["times"][0])
    found["others in turn"] = sum(times) / len(times)
    return found


async def clients(port: int, count: int, tokens: int, more: dict[str, Any]) -> float:
    """Tokens per second of so many clients at once."""
    began = time.perf_counter()
    await asyncio.gather(*(ask(port, text(100 + i, 64), tokens, **more) for i in range(count)))
    return count * tokens / (time.perf_counter() - began)


def start_theirs(a: argparse.Namespace, folder: Path) -> tuple[subprocess.Popen[str], int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {
        "model": folder / "32.gguf", "port": port, "n_ctx": a.length + 1024, "n_gpu_layers": 0,
        "n_threads": a.threads, "n_threads_batch": a.threads, "cache": "true",
        "cache_size": 2**33, "verbose": "false", "interrupt_requests": "false",
    }  # fmt: skip
    command = [a.llama_python, "-m", "llama_cpp.server"]
    command += [part for name, value in options.items() for part in (f"--{name}", str(value))]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True
    )
    for _ in range(600):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return process, port
        if process.poll() is not None:
            break
        time.sleep(0.1)
    raise SystemExit("llama_cpp.server does not start: " + " ".join(command))


def measure(a: argparse.Namespace, port: int, more: dict[str, Any]) -> dict[str, Any]:
    asyncio.run(ask(port, "warm", 4, **more))
    found: dict[str, Any] = asyncio.run(turns(port, a.length, more))
    for count in a.clients:
        found[f"{count} clients"] = asyncio.run(clients(port, count, a.tokens, more))
    return found


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--llama-python", required=True)
    parser.add_argument("--presets", nargs="+", default=["taylor", "softmax"])
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory", default="14GiB")
    return parser.parse_args()


def main() -> None:
    a, found = options(), {}
    sizes = {
        "width": a.width, "layers": a.depth, "heads": a.width // 64, "vocabulary": a.vocabulary,
        "hidden": a.width * 8 // 3 // 64 * 64, "texts": 1,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        export(folder, sizes, [32])
        subprocess.run([a.llama_python, str(THEIRS), "write", str(folder)], check=True)
        for preset in a.presets:
            run = folder / f"{preset}-32"
            byte_tokenizer().save_pretrained(run)
            served, port, _ = start(
                run, ["--memory", a.memory, "--slots", "4", "--threads", str(a.threads)]
            )
            found[preset] = measure(a, port, {"logit_bias": {"256": -100}})
            served.send_signal(signal.SIGTERM)
            served.wait(60)
        theirs, port = start_theirs(a, folder)
        try:
            found["llama.cpp"] = measure(a, port, {"logit_bias": {"258": -100}})
        finally:
            theirs.kill()
    table = Table(
        "server", *(f"{name}, ms" for name in TURNS), *(f"{n} clients" for n in a.clients)
    )
    for name, row in found.items():
        table.add_row(name, *(f"{x:,.0f}" for x in row.values()))
    Console(width=120).print(table)
    print(json.dumps({"options": vars(a), "results": found}, default=str))


if __name__ == "__main__":
    sys.exit(main())
