"""Against FLASH-pytorch: time and memory of its FLASHTransformer and of one more token.

Both have the same weights. The model is that of the package's train.py (8 layers of 512, groups of
256, Laplace, token shift, bytes) in fp32. Each row is one process for each library, in turn: the
median of its calls, and their peak memory beyond the weights. The package generates by running the
whole sequence for every token; ours steps on a state.

    python benchmarks/against_flash_pytorch.py
    python benchmarks/against_flash_pytorch.py --products torch    # both without oneDNN
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch

from cumulant.interop import from_flash_pytorch
from cumulant.kernels import product

LENGTHS = [1024, 4096, 16384]
PASSES = ["forward", "fwd+bwd", "decode"]


def measure(
    library: str, length: int, what: str, products: str, depth: int, repeats: int = 3
) -> dict[str, float]:
    from flash_pytorch import FLASHTransformer

    torch.manual_seed(0)
    torch.set_num_threads(2)
    if products == "torch":
        product._onednn = None
    options = {"group_size": 256, "causal": True, "shift_tokens": True, "laplace_attn_fn": True}
    model = FLASHTransformer(num_tokens=256, dim=512, depth=depth, **options)
    if library == "cumulant":
        model = from_flash_pytorch(model)
    model.eval()

    def logits(ids: torch.Tensor) -> torch.Tensor:
        return model(ids) if library == "theirs" else model(ids, use_cache=False).logits

    def train(ids: torch.Tensor) -> torch.Tensor:
        out = logits(ids)
        torch.nn.functional.cross_entropy(out.flatten(0, 1), ids.flatten()).backward()
        model.zero_grad()
        return out.detach()

    def timed(run: Callable[[], object]) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    ids = torch.randint(256, (1, length), generator=torch.Generator().manual_seed(1))
    run: Callable[[], torch.Tensor]
    if what == "fwd+bwd":
        run = lambda: train(ids)  # noqa: E731
    else:
        torch.set_grad_enabled(False)
        run = lambda: logits(ids)  # noqa: E731
    if what == "decode" and library == "cumulant":
        cache = model(ids[:, :-1], use_cache=True).past_key_values
        run, repeats = lambda: model(ids[:, -1:], past_key_values=cache, use_cache=True).logits, 50
    else:
        train(ids[:, :64]) if what == "fwd+bwd" else logits(ids[:, :64])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    first = run()
    seconds = statistics.median(timed(run) for _ in range(repeats))
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {"seconds": seconds, "peak_mib": peak, "check": float(first[:, -1].double().norm())}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--products", choices=["onednn", "torch"], default="onednn")
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS)
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=PASSES)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(**json.loads(options.one))))
        return
    results = []
    print(" tokens pass      theirs s   ours s   ratio  theirs MiB  ours MiB")
    for length in options.lengths:
        for what in options.passes:
            found = {}
            for library in ("theirs", "cumulant"):
                job = {
                    "library": library,
                    "length": length,
                    "what": what,
                    "products": options.products,
                }
                command = [
                    sys.executable,
                    "-W",
                    "ignore",
                    __file__,
                    "--one",
                    json.dumps({**job, "depth": options.depth}),
                ]
                lines = subprocess.run(
                    command, capture_output=True, text=True, check=True
                ).stdout.splitlines()
                found[library] = json.loads(lines[-1])
            theirs, ours = found["theirs"], found["cumulant"]
            assert abs(theirs["check"] / ours["check"] - 1) < 1e-3, (theirs, ours)
            results.append({"length": length, "pass": what, **found})
            print(
                f"{length:>7,} {what:<8} {theirs['seconds']:>9.3f} {ours['seconds']:>8.4f}"
                f" {theirs['seconds'] / ours['seconds']:>7.1f} {theirs['peak_mib']:>11,.0f}"
                f" {ours['peak_mib']:>9,.0f}",
                flush=True,
            )
    print(
        json.dumps({"torch": torch.__version__, "products": options.products, "results": results})
    )


if __name__ == "__main__":
    main()
