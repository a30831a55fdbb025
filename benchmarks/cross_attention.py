"""Memory and time of cross attention onto a long context, by number of queries.

Each measurement is a process of its own, with its own peak. "peak" is the process's peak memory
beyond the context; "read" is the time of the queries alone, on a state computed before.

    python benchmarks/cross_attention.py [--context 1048576] [--queries 1 64 4096 65536]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cumulant.nn import LinearAttention, TaylorAttention

DIM, HEADS = 128, 4


class Softmax(nn.Module):
    """The same projections with fused softmax attention.

    Its "state" is the context's keys and values.
    """

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(DIM, DIM, bias=False) for _ in range(3))
        self.out_proj = nn.Linear(DIM, DIM, bias=False)

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)

    def encode_context(self, context: Tensor) -> tuple[Tensor, Tensor]:
        return self.heads(self.k_proj(context)), self.heads(self.v_proj(context))

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> Tensor:
        out = F.scaled_dot_product_attention(self.heads(self.q_proj(x)), *state)
        return self.out_proj(out.transpose(1, 2).flatten(2))


MIXERS = {
    "taylor": lambda: TaylorAttention(DIM, HEADS, is_causal=False),
    "linear": lambda: LinearAttention(DIM, HEADS, is_causal=False),
    "softmax": Softmax,
}


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(mixer: str, context_length: int, queries: int, piece: int) -> dict[str, float]:
    torch.manual_seed(0)
    torch.set_num_threads(2)
    module = MIXERS[mixer]()
    context, x = torch.randn(1, context_length, DIM), torch.randn(1, queries, DIM)
    with torch.inference_mode():
        module(x[:, :1], state=module.encode_context(context[:, :256]))  # libraries load
        before, start = peak_mib(), time.perf_counter()
        if mixer == "softmax":
            state = module.encode_context(context)
            held = sum(s.numel() * s.element_size() for s in state)
        else:
            state = None
            for part in context.split(piece, 1):
                state = module.encode_context(part, state=state)
            held = state.nbytes
        middle = time.perf_counter()
        module(x, state=state)
        end = time.perf_counter()
    return {
        "peak_mib": peak_mib() - before,
        "state_bytes": held,
        "encode_s": middle - start,
        "read_s": end - middle,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--context", type=int, default=1 << 20)
    parser.add_argument("--queries", type=int, nargs="+", default=[1, 64, 4096, 65536])
    parser.add_argument(
        "--piece", type=int, default=1 << 16, help="tokens of context encoded at a time"
    )
    parser.add_argument("--mixers", nargs="+", default=list(MIXERS), choices=list(MIXERS))
    parser.add_argument(
        "--softmax-queries",
        type=int,
        default=64,
        help="largest number for softmax: its time is T x S",
    )
    parser.add_argument("--one", nargs=2, metavar=("MIXER", "QUERIES"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(
            json.dumps(measure(options.one[0], options.context, int(options.one[1]), options.piece))
        )
        return
    results = []
    print(
        f"{'mixer':<8} {'queries':>8} {'peak MiB':>9} {'state bytes':>13} {'encode s':>9}"
        f" {'read s':>8}"
    )
    for mixer in options.mixers:
        for queries in options.queries:
            if mixer == "softmax" and queries > options.softmax_queries:
                continue
            command = [
                sys.executable,
                __file__,
                "--context",
                str(options.context),
                "--piece",
                str(options.piece),
            ]
            line = subprocess.run(
                [*command, "--one", mixer, str(queries)], capture_output=True, text=True, check=True
            ).stdout
            found = json.loads(line)
            results.append({"mixer": mixer, "queries": queries, **found})
            print(
                f"{mixer:<8} {queries:>8,} {found['peak_mib']:>9,.0f} {found['state_bytes']:>13,} "
                f"{found['encode_s']:>9.2f} {found['read_s']:>8.3f}",
                flush=True,
            )
    print(json.dumps({"torch": torch.__version__, "context": options.context, "results": results}))


if __name__ == "__main__":
    main()
