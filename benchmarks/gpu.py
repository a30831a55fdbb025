"""Times of attention on a GPU, beside fused softmax and the GPU's own limits.

    python benchmarks/gpu.py                      a table, and runs/gpu.json
    python benchmarks/gpu.py --lengths 1024 8192 --dtype fp16

Each line has medians by CUDA events (`triton.testing.do_bench`), forwards and with gradients, and
how many times longer the forward pass takes than copying what it must at least read and write.
`make test-gpu` runs the tests first.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import cumulant as cm

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def milliseconds(run: Callable[[], Any], device: str) -> float:
    """The median time of a call."""
    if device == "cuda":
        from triton.testing import do_bench

        return float(do_bench(run, return_mode="median"))
    run()
    times = []
    for _ in range(3):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def copy_rate(device: str) -> float:
    """Bytes a millisecond that a copy of 256 MiB reads and writes."""
    x = torch.empty(2**28 if device == "cuda" else 2**24, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    return 2 * x.numel() / milliseconds(lambda: y.copy_(x), device)


def product_rate(device: str, dtype: torch.dtype) -> float:
    """Operations a millisecond in a product of two matrices."""
    n = 8192 if device == "cuda" else 512
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / milliseconds(lambda: a @ b, device)


def calls(B: int, H: int, T: int, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Operations and their inputs, by name."""

    def draw(K: int, *shape: int) -> Tensor:
        return torch.randn(*shape, K, device=device).to(dtype).requires_grad_()

    def tokens(K: int, heads: int = H) -> Tensor:
        return draw(K, B, heads, T)

    logs = torch.rand(B, H, T, device=device).mul_(-0.01)
    causal = {"is_causal": True}
    wide = tokens(64), tokens(64), tokens(64)
    narrow = tokens(16), tokens(16), tokens(64)
    logits = [torch.randn(B, H, T, device=device).requires_grad_() for _ in range(3)]
    groups = [tokens(128, 1) for _ in range(4)]
    softmax = torch.nn.functional.scaled_dot_product_attention
    return {
        "softmax": (softmax, wide, causal),
        "elu + 1": (cm.linear_attention, wide, causal),
        "elu + 1, decay": (cm.linear_attention, wide, causal | {"log_decay": logs}),
        "Taylor-16": (cm.taylor_attention, narrow, causal),
        "Taylor-16, decay": (cm.taylor_attention, narrow, causal | {"log_decay": logs}),
        "ELiTA": (cm.elita_attention, (*logits, tokens(64)), {}),
        "mixed chunks": (cm.mixed_chunk_attention, (*groups, tokens(512, 1)), causal),
    }


def measure(
    op: Any, inputs: tuple[Tensor, ...], given: dict[str, Any], device: str, rate: float
) -> dict[str, Any]:
    """One row."""

    def run(*x: Tensor) -> Tensor:
        found: Tensor = op(*x, **given)
        return found

    with torch.no_grad():
        forward = milliseconds(lambda: run(*inputs), device)
    out = run(*inputs)
    upstream = torch.randn_like(out)
    both = milliseconds(lambda: torch.autograd.grad(run(*inputs), inputs, upstream), device)
    least = sum(x.numel() * x.element_size() for x in (*inputs, out))
    return {
        "impl": cm.explain(op, *inputs, **given).impl if hasattr(op, "is_operation") else "torch",
        "forward_ms": forward, "with_gradients_ms": both,
        "least_bytes": least, "forward_floors": forward * rate / least,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[256, 512, 1024, 4096, 16384, 65536]
    )
    parser.add_argument("--tokens", type=int, default=65536, help="tokens in a batch")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--device", default="cuda", help="cuda; cpu to try this program")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu.json"))
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no GPU; --device cpu only tries this program")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    dtype, rate = DTYPES[options.dtype], copy_rate(options.device)
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "CPU",
        "torch": torch.__version__, "dtype": options.dtype, "heads": options.heads,
        "copied_bytes_per_ms": rate,
        "operations_per_ms": product_rate(options.device, dtype), "rows": [],
    }  # fmt: skip
    print(f"{report['device']}: copies {rate / 1e6:.0f} GB/s", flush=True)
    print(f"{'call':20}{'T':>8}{'forward':>12}{'gradients':>12}{'floors':>9}")
    for T in options.lengths:
        B = max(1, options.tokens // T)
        every = calls(B, options.heads, T, dtype, options.device)
        for name, (op, inputs, given) in every.items():
            try:
                row = measure(op, inputs, given, options.device, rate)
            except torch.OutOfMemoryError:
                print(f"{name:20}{T:8}   not enough memory")
                continue
            report["rows"].append({"call": name, "T": T, "B": B} | row)
            options.output.write_text(json.dumps(report, indent=1))
            print(
                f"{name:20}{T:8}{row['forward_ms']:9.3f} ms{row['with_gradients_ms']:9.3f} ms"
                f"{row['forward_floors']:9.2f}  {row['impl']}",
                flush=True,
            )


if __name__ == "__main__":
    main()
