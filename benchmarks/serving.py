"""`cumulant serve` under load, on this machine alone: throughput, latency, second turns, memory.

    python benchmarks/serving.py [--width 768] [--depth 12] [--clients 1 8 64 256] [--quick]

A model with random weights is served by a process of its own. Clients ask over loopback for streams
of tokens; each asks again when it has its answer. Then a long prompt is asked twice, and a second
time with a further turn; many conversations are opened, each with two turns; and many short
requests follow. Memory is the process's peak (VmHWM), beside what the server announced. The last
line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from cumulant.models import PRESETS, CumulantConfig, CumulantForCausalLM, from_preset
from cumulant.models.rows import cache_bytes_after
from cumulant.text.tokenizer import byte_tokenizer

ENDLESS = {"logit_bias": {"256": -100}}


async def ask(port: int, prompt: list[int] | str, tokens: int, **more: Any) -> dict[str, Any]:
    """One streamed completion: the times of its tokens, and its usage."""
    body = {"prompt": prompt, "max_tokens": tokens, "stream": True, **ENDLESS, **more}
    body["stream_options"] = {"include_usage": True}
    data = json.dumps(body).encode()
    began = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**24)
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    writer.write(head.encode() + data)
    await writer.drain()
    times, usage, texts = [], {}, []
    while line := await reader.readline():
        if (
            line.startswith(b'data: {"error"')
            or b'"detail"' in line[:12]
            or line.startswith(b'{"error"')
        ):
            raise SystemExit(line.decode())
        if not line.startswith(b"data: {"):
            continue
        if b'"choices": []' in line or b'"choices":[]' in line:
            usage = json.loads(line[6:])["usage"]
        else:
            times.append(time.perf_counter() - began)
            texts.append(line)
    writer.close()
    return {"times": times, "usage": usage, "texts": texts}


async def load(port: int, clients: int, requests: int, prompt: int, tokens: int) -> dict[str, Any]:
    """Clients that each ask `requests` times, one after another."""
    generator = torch.Generator().manual_seed(clients)
    firsts, gaps, drawn = [], [], 0

    async def client() -> None:
        nonlocal drawn
        for _ in range(requests):
            ids = torch.randint(256, (prompt,), generator=generator).tolist()
            found = await ask(port, ids, tokens)
            drawn += found["usage"]["completion_tokens"]
            firsts.append(found["times"][0])
            gaps.extend(b - a for a, b in zip(found["times"], found["times"][1:]))

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    seconds = time.perf_counter() - began
    return {
        "clients": clients,
        "tokens_per_second": drawn / seconds,
        "first_ms": [1e3 * statistics.median(firsts), 1e3 * quantile(firsts, 0.99)],
        "between_ms": [1e3 * statistics.median(gaps), 1e3 * quantile(gaps, 0.99)],
    }


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


async def turns(port: int, length: int) -> dict[str, Any]:
    """Milliseconds to the first token of a long prompt, of the same again, and of a second turn."""
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(256, (length,), generator=generator).tolist()
    found: dict[str, Any] = {"tokens": length}
    more = torch.randint(256, (40,), generator=generator).tolist()
    for name, prompt in (("first", ids), ("again", ids), ("second turn", ids + more)):
        answer = await ask(port, prompt, 1)
        cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        found[name] = {"ms": 1e3 * answer["times"][0], "cached": cached / len(prompt)}
    return found


async def conversations(port: int, count: int, length: int) -> dict[str, Any]:
    """Many conversations, all opened before the second turn of any."""
    generator = torch.Generator().manual_seed(count)
    texts = [torch.randint(256, (length,), generator=generator).tolist() for _ in range(count)]

    async def each(prompts: list[list[int]]) -> float:
        shares = []
        for begin in range(0, len(prompts), 16):
            answers = await asyncio.gather(*(ask(port, p, 4) for p in prompts[begin : begin + 16]))
            for prompt, answer in zip(prompts[begin : begin + 16], answers):
                cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
                shares.append(cached / len(prompt))
        return statistics.mean(shares)

    await each(texts)
    return {"count": count, "tokens": length, "cached": await each([[*t, 1, 2] for t in texts])}


def peak(process: subprocess.Popen[str]) -> tuple[int, int]:
    """The most memory that the process has held, and what it holds now, in bytes."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    sizes = [re.search(rf"{name}:\s+(\d+) kB", status) for name in ("VmHWM", "VmRSS")]
    high, now = (1024 * int(size[1]) if size else 0 for size in sizes)
    return high, now


def start(folder: Path, options: list[str]) -> tuple[subprocess.Popen[str], int, list[str]]:
    command = [
        sys.executable,
        "-u",
        "-m",
        "cumulant",
        "serve",
        str(folder),
        "--port",
        "0",
        *options,
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    lines = []
    for line in process.stdout or ():
        lines.append(line.strip())
        if found := re.search(r"listening at http://.*:(\d+)", line):
            return process, int(found[1]), lines
    raise SystemExit("\n".join(lines))


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="taylor")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=4, help="requests of a client, at least")
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--memory", default="4GiB")
    parser.add_argument("--long", type=int, nargs="*", default=[8192, 60_000])
    parser.add_argument("--conversations", type=int, default=1000)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--sizes", action="store_true", help="only the sizes of states, by preset")
    parser.add_argument("--quick", action="store_true", help="a tiny model: a try, no evidence")
    chosen = parser.parse_args()
    if chosen.quick:
        chosen.width, chosen.depth, chosen.clients, chosen.long = 64, 2, [1, 8], [2048]
        chosen.conversations, chosen.requests = 20, 100
    return chosen


def model_config(a: argparse.Namespace, preset: str) -> CumulantConfig:
    return from_preset(
        preset, hidden_size=a.width, num_hidden_layers=a.depth,
        num_attention_heads=max(a.width // 64, 1), vocab_size=a.vocabulary,
    )  # fmt: skip


def write_model(a: argparse.Namespace, folder: Path) -> None:
    torch.manual_seed(0)
    CumulantForCausalLM(model_config(a, a.preset)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def print_sizes(a: argparse.Namespace) -> None:
    """What a conversation of each preset takes in memory, by its tokens."""
    lengths = (1024, 8192, 65_536)
    table = Table("preset", *(f"{n:,} tokens" for n in lengths), "conversations of 8,192 in 1 GiB")
    for preset in PRESETS:
        model = CumulantForCausalLM(model_config(a, preset)).eval()
        sizes = [cache_bytes_after(model, n) for n in lengths]
        shown = (f"{size / 2**20:,.2f} MiB" for size in sizes)
        table.add_row(preset, *shown, f"{2**30 // sizes[1]:,}")
    Console().print(table)


def measure(a: argparse.Namespace, port: int, process: subprocess.Popen[str]) -> dict[str, Any]:
    asyncio.run(load(port, 1, 2, a.prompt, 8))
    table = Table("clients", "tokens/s", "first token, ms", "p99", "between, ms", "p99")
    results: dict[str, Any] = {"load": []}
    for count in a.clients:
        row = asyncio.run(load(port, count, max(a.rounds, 16 // count), a.prompt, a.tokens))
        results["load"].append(row)
        figures = (f"{x:,.1f}" for x in (*row["first_ms"], *row["between_ms"]))
        table.add_row(str(count), f"{row['tokens_per_second']:,.0f}", *figures)
    Console().print(table)
    results["turns"] = [asyncio.run(turns(port, length)) for length in a.long]
    for found in results["turns"]:
        print(found)
    results["conversations"] = asyncio.run(conversations(port, a.conversations, 1000))
    print(results["conversations"])
    before = peak(process)[1]
    for _ in range(0, a.requests, 100):
        asyncio.run(load(port, 50, 2, 16, 2))
    results["memory"] = {"peak": peak(process)[0], "growth": peak(process)[1] - before}
    print(results["memory"])
    return results


def main() -> None:
    a = options()
    if a.sizes:
        print_sizes(a)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        write_model(a, folder)
        limits = ["--slots", str(a.slots), "--memory", a.memory, "--queue", "1024"]
        limits += ["--threads", str(a.threads)]
        process, port, lines = start(folder, limits)
        try:
            print("\n".join(lines))
            results = measure(a, port, process)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)
    print(json.dumps({"options": vars(a), **results}))


if __name__ == "__main__":
    main()
