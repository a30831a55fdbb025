"""ELiTA's attention and feed-forward against their eager forms: time, and memory for backward.

The eager attention is the published equation in PyTorch, two cumulative sums of clipped
exponentials. The eager feed-forward is one einsum over its hidden layer. Calls take turns in one
process, on the same inputs in fp32, and figures are medians.

    python benchmarks/elita.py --threads 2
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

import cumulant as cm
from cumulant import nn

ATTENTION = [
    (128, 4, 256, 16),
    (16, 4, 256, 64),
    (8, 8, 1024, 64),
    (1, 8, 16384, 64),
    (1, 4, 100_000, 32),
]  # B H T V
FEED_FORWARD = [(128 * 256, 64), (4096, 256), (2048, 512)]  # tokens, D
CONTEXTS = [1_000, 10_000, 100_000]


def eager_attention(c: Tensor, r: Tensor, s: Tensor, v: Tensor) -> Tensor:
    weight, row, own = (x.clamp(-20, 20).exp()[..., None] for x in (c, r, s))
    return ((weight * v).cumsum(2) * row + own * v) / (weight.cumsum(2) * row + own)


def eager_feed_forward(module: nn.ElitaFeedForward, x: Tensor) -> Tensor:
    a, b = F.silu(module.hidden_proj(x)), F.silu(module.factor_proj(x))
    w = module.out_proj.weight.view(module.dim, module.factor, module.hidden)
    return torch.einsum("ni,nf,dfi->nd", a, b, w) + module.out_proj.bias


def side_by_side(
    ours: Callable[[], Tensor], theirs: Callable[[], Tensor], leaves: list[Tensor], rounds: int
) -> dict:
    """Median seconds of each, forward and forward with backward.

    It also returns the bytes kept for the backward pass, except the leaves.
    """
    torch.testing.assert_close(ours(), theirs(), rtol=1e-3, atol=1e-4)
    found: dict[str, dict[str, float]] = {}
    for backward in (False, True):
        times: dict[str, list[float]] = {"ours": [], "eager": []}
        for _ in range(rounds + 1):
            for name, run in (("ours", ours), ("eager", theirs)):
                start = time.perf_counter()
                with torch.set_grad_enabled(backward):
                    out = run()
                if backward:
                    torch.autograd.grad(out, leaves, torch.ones_like(out))
                times[name].append(time.perf_counter() - start)
        found["both" if backward else "forward"] = {
            name: statistics.median(t[1:]) for name, t in times.items()
        }
    own = {x.untyped_storage().data_ptr() for x in leaves}
    found["kept_bytes"] = {}
    for name, run in (("ours", ours), ("eager", theirs)):
        kept: dict[int, int] = {}

        def note(x: Tensor, kept: dict[int, int] = kept) -> Tensor:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            out = run()
        found["kept_bytes"][name] = sum(size for where, size in kept.items() if where not in own)
        del out
    return found


def show(label: str, found: dict) -> None:
    forward, both, kept = found["forward"], found["both"], found["kept_bytes"]
    print(
        f"{label:<34} forward {1e3 * forward['ours']:8.1f} ms"
        f" ({forward['eager'] / forward['ours']:4.1f}x)   with backward {1e3 * both['ours']:8.1f}"
        f" ms ({both['eager'] / both['ours']:4.1f}x)   kept {kept['ours'] / 2**20:7.1f} of"
        f" {kept['eager'] / 2**20:7.1f} MiB",
        flush=True,
    )


def attention(B: int, H: int, T: int, V: int, rounds: int) -> dict:
    torch.manual_seed(0)
    logits = [torch.randn(B, H, T).mul_(2).requires_grad_() for _ in range(3)]
    value = torch.randn(B, T, H, V).transpose(1, 2).requires_grad_()
    leaves = [*logits, value]
    return side_by_side(
        lambda: cm.elita_attention(*leaves), lambda: eager_attention(*leaves), leaves, rounds
    )


def feed_forward(tokens: int, dim: int, rounds: int) -> dict:
    torch.manual_seed(0)
    module = nn.ElitaFeedForward(dim)
    x = torch.randn(tokens, dim, requires_grad=True)
    leaves = [x, *module.parameters()]
    return side_by_side(lambda: module(x), lambda: eager_feed_forward(module, x), leaves, rounds)


@torch.inference_mode()
def steps(context: int, rounds: int) -> dict[str, float]:
    """Seconds of the next token, with H = 8 and V = 64.

    A step extends a state; the eager form computes all tokens again.
    """
    torch.manual_seed(0)
    inputs = [*(torch.randn(1, 8, context) for _ in range(3)), torch.randn(1, 8, context, 64)]
    last = [x[:, :, -1:] for x in inputs]
    state = cm.elita_attention(*(x[:, :, :-1] for x in inputs), return_state=True)[1]
    times: dict[str, list[float]] = {"ours": [], "eager": []}
    for _ in range(rounds + 1):
        start = time.perf_counter()
        for _ in range(20):
            out = cm.elita_attention(*last, state=state, return_state=True)[0]
        times["ours"].append((time.perf_counter() - start) / 20)
        start = time.perf_counter()
        whole = eager_attention(*inputs)
        times["eager"].append(time.perf_counter() - start)
    torch.testing.assert_close(out, whole[:, :, -1:], rtol=1e-3, atol=1e-4)
    return {name: statistics.median(t[1:]) for name, t in times.items()} | {
        "state_bytes": state.nbytes
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results: dict[str, list] = {"attention": [], "feed_forward": [], "steps": []}
    for shape in ATTENTION:
        found = attention(*shape, options.rounds)
        results["attention"].append({"shape": shape, **found})
        show("attention B={} H={} T={:,} V={}".format(*shape), found)
    for tokens, dim in FEED_FORWARD:
        found = feed_forward(tokens, dim, options.rounds)
        results["feed_forward"].append({"tokens": tokens, "dim": dim, **found})
        show(f"feed-forward {tokens:,} tokens of {dim}", found)
    for context in CONTEXTS:
        found = steps(context, options.rounds)
        results["steps"].append({"context": context, **found})
        print(
            f"token {context:>7,}: {1e6 * found['ours']:6.0f} us onto a state of"
            f" {found['state_bytes']:,.0f} bytes, {1e3 * found['eager']:8.1f} ms by the whole"
        )
    print(json.dumps({"torch": torch.__version__, "threads": options.threads, **results}))


if __name__ == "__main__":
    main()
