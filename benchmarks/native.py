"""The native CPU kernels beside their floor and their peers, on the same inputs in one run.

The floor of a row is its number of multiplications and additions over the rate that the vector
units reach in this run from registers. In the letters of DESIGN.md, with chunks of 64, a token and
head takes 4 F V + 64 (K + V) of them forward, and 10 F V + 64 (4 K + 3 V) backward. The floor of
the memory is the number of bytes read and written over the rate of a copy. Rows are medians.

Peers are the chunk-parallel PyTorch implementation, PyTorch's fused softmax attention, and the
cores of taylor-series-linear-attention (features, then the causal product) and of
pytorch-fast-transformers. The causal product needs pytorch-fast-transformers 0.4.0, compiled:

    pip install --no-build-isolation pytorch-fast-transformers
    python benchmarks/native.py --threads 2
    python benchmarks/native.py --threads 2 --lengths            # time by length, and crossovers
    python benchmarks/native.py --threads 2 --lengths --plot docs/figures
    python benchmarks/native.py --draw docs/figures              # the picture again, from its rows
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

import cumulant as cm
from cumulant.kernels.native import library

warnings.filterwarnings("ignore")
CHUNK = 64
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    name: str
    B: int
    H: int
    T: int
    K: int
    V: int
    order: int  # 0: elu + 1
    is_causal: bool = True

    @property
    def F(self) -> int:
        return cm.feature_count(self.K, self.order) if self.order else self.K

    @property
    def operations(self) -> tuple[int, int]:
        """Forward and backward."""
        inside = CHUNK if self.is_causal else 0
        forward = 4 * self.F * self.V + inside * (self.K + self.V)
        backward = 10 * self.F * self.V + inside * (4 * self.K + 3 * self.V)
        tokens = self.B * self.H * self.T
        return forward * tokens, backward * tokens

    @property
    def bytes(self) -> int:
        """Inputs and outputs of the forward pass, fp32."""
        return self.B * self.H * self.T * (2 * self.K + 2 * self.V) * 4


CASES = [
    Case("taylor-2", 1, 16, 8192, 16, 64, 2),
    Case("taylor-2, one head", 1, 1, 65536, 16, 64, 2),
    Case("taylor-2, both directions", 1, 16, 8192, 16, 64, 2, False),
    Case("taylor-3", 1, 4, 4096, 16, 64, 3),
    Case("elu+1", 2, 8, 4096, 64, 64, 0),
    Case("elu+1, both directions", 2, 8, 4096, 64, 64, 0, False),
]
LENGTHS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
LIMIT = 8.0  # seconds that one call of a peer may take


def attention(case: Case, impl: str) -> Attention:
    if case.order:
        return lambda q, k, v: cm.taylor_attention(
            q, k, v, case.order, is_causal=case.is_causal, impl=impl
        )
    return lambda q, k, v: cm.linear_attention(q, k, v, is_causal=case.is_causal, impl=impl)


def sdpa(case: Case) -> Attention:
    return lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=case.is_causal
    )


def peers(case: Case) -> dict[str, Attention]:
    found = {
        "native": attention(case, "native"),
        "torch": attention(case, "torch"),
        "sdpa": sdpa(case),
    }
    if not case.is_causal:
        return found
    try:
        from fast_transformers.causal_product import causal_dot_product
    except ImportError:
        return found
    if case.order == 2:
        from taylor_series_linear_attention.attention import second_taylor_expansion

        def core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k = second_taylor_expansion(q * case.K**-0.5), second_taylor_expansion(k)
            z = 1 / torch.einsum("...nd,...nd->...n", q, k.cumsum(-2))
            return causal_dot_product(q, k, v) * z[..., None]

        found["taylor package"] = core
    elif case.order == 0:

        def elu(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k = torch.nn.functional.elu(q) + 1, torch.nn.functional.elu(k) + 1
            z = 1 / (torch.einsum("nhli,nhli->nhl", q, k.cumsum(-2)) + 1e-6)
            return causal_dot_product(q, k, v) * z[..., None]

        found["fast-transformers"] = elu
    return found


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(case: Case, repeats: int, slow: set[str]) -> dict[str, dict[str, float]]:
    """Median seconds of every peer's forward pass and of both passes, taken in turn.

    Peers in `slow` are left out.
    """
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(case.B, case.H, case.T, d, requires_grad=True) for d in (case.K, case.K, case.V)
    )
    upstream = torch.randn(case.B, case.H, case.T, case.V)

    def inputs(
        name: str,
    ) -> tuple[Tensor, ...]:  # PyTorch's fused softmax wants keys as wide as values
        return (*wide, v) if name == "sdpa" else (q, k, v)

    def forward(name: str, run: Attention) -> object:
        with torch.no_grad():
            return run(*inputs(name))

    def both(name: str, run: Attention) -> object:
        return torch.autograd.grad(run(*inputs(name)), inputs(name), upstream)

    if case.T > 16384:
        slow = slow | {"sdpa"}  # minutes
    runs = {name: run for name, run in peers(case).items() if name not in slow}
    wide = (
        [torch.randn(case.B, case.H, case.T, case.V, requires_grad=True) for _ in range(2)]
        if "sdpa" in runs
        else []
    )
    times: dict[str, dict[str, list[float]]] = {name: {"forward": [], "both": []} for name in runs}
    for i in range(repeats + 1):
        for name, run in runs.items():
            if i > 1 and times[name]["both"][-1] > LIMIT / 4:
                continue
            for which, call in (("forward", forward), ("both", both)):
                taken = seconds(lambda: call(name, run))  # noqa: B023
                if i or taken > LIMIT / 4:  # the first call warms up
                    times[name][which].append(taken)
    return {
        name: {which: statistics.median(x) for which, x in each.items()}
        for name, each in times.items()
    }


def copy_rate() -> float:
    """Bytes a second, read and written, of a copy too large for the caches."""
    x = torch.zeros(64_000_000)
    y = torch.zeros_like(x)
    return 2 * x.numel() * 4 / min(seconds(lambda: y.copy_(x)) for _ in range(7))


def table(repeats: int, rate: float, bandwidth: float) -> list[dict[str, object]]:
    print(
        "                                      ms   ns/token-head  x floor  memory's   times as"
        " fast as"
    )
    rows = []
    for case in CASES:
        found = measure(case, repeats, set())
        forward, backward = case.operations
        for which, operations in (("forward", forward), ("both", forward + backward)):
            own, floor = found["native"][which], operations / rate
            others = ", ".join(
                f"{n} {t[which] / own:.1f}" for n, t in found.items() if n != "native"
            )
            per_token = own / (case.B * case.H * case.T) * 1e9
            memory = (
                f"{case.bytes / bandwidth * 1e3:6.2f} ms" if which == "forward" else "         "
            )
            figures = f"{own * 1e3:7.2f} {per_token:12.0f} {own / floor:10.2f}   {memory}"
            print(f"{case.name:<26} {which:<8} {figures}   {others}", flush=True)
        rows.append(
            {
                **asdict(case),
                "seconds": found,
                "floor": [forward / rate, (forward + backward) / rate],
            }
        )
    return rows


def by_length(repeats: int) -> list[dict[str, object]]:
    """Forward and both passes by length, with 16 heads of V = 64.

    Heads of softmax are as wide as the mechanism's values.
    """
    rows = []
    print("mechanism     T      native ms           torch       sdpa  (forward, both)")
    for name, K, order in (("taylor-2", 16, 2), ("elu+1", 64, 0)):
        crossed = dict.fromkeys(("forward", "both"), 0)
        for T in LENGTHS:
            peers = {"taylor package", "fast-transformers"}
            found = measure(Case(name, 1, 16, T, K, 64, order), repeats if T < 2048 else 3, peers)
            shown = (
                f"{found[n]['forward'] * 1e3:8.3f} {found[n]['both'] * 1e3:8.3f}"
                for n in ("native", "torch", "sdpa")
            )
            print(f"{name:<9} {T:>6}  ", "  ".join(shown), flush=True)
            rows.append({"mechanism": name, "T": T, "seconds": found})
            for which, first in crossed.items():
                faster = found["native"][which] < found["sdpa"][which]
                crossed[which] = (first or T) if faster else 0
        for which, first in crossed.items():
            print(f"{name}: {which} faster than softmax from T = {first or 'beyond the longest'}")
    return rows


def draw(rows: list[dict[str, object]], folder: Path) -> None:
    """Nanoseconds by length, in a panel for each mechanism and pass.

    The styles are those of `cumulant bench`.
    """
    from cumulant.bench.reports.plots import add_legend, label_ticks, panel_column, save_figure
    from cumulant.bench.speed.subjects import SUBJECTS

    figure, panels = panel_column(4, sharey=True)
    cases = [(name, which) for name in ("taylor-2", "elu+1") for which in ("forward", "both")]
    for panel, (name, which) in zip(panels, cases, strict=True):
        subject = "taylor" if name == "taylor-2" else "linear"
        own = [row for row in rows if row["mechanism"] == name]
        lengths = [row["T"] for row in own]
        for peer, label, drawn_as in (
            ("native", "native", subject),
            ("torch", "torch", f"{subject}, torch"),
            ("sdpa", "fused softmax", "softmax"),
        ):
            times = [row["seconds"][peer][which] / row["T"] / 16 * 1e9 for row in own]  # type: ignore[index]
            panel.plot(lengths, times, label=label, **SUBJECTS[drawn_as].style.line_options())
        panel.set(xscale="log", yscale="log", xlabel="tokens", ylabel="ns a token and head")
        label_ticks(panel.xaxis, lengths[::2], "{:,}")
        add_legend(panel, f"{name}, {'forward' if which == 'forward' else 'forward and backward'}")
    save_figure(figure, folder, "native", [".svg"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--lengths", action="store_true", help="time by length instead of the table"
    )
    parser.add_argument(
        "--plot", type=Path, help="folder for the rows and the picture of --lengths"
    )
    parser.add_argument(
        "--draw", type=Path, help="only draw the picture again, from the rows in this folder"
    )
    options = parser.parse_args()
    if options.draw:
        lines = (options.draw / "native.jsonl").read_text().splitlines()
        draw([json.loads(line) for line in lines], options.draw)
        return
    torch.set_num_threads(options.threads)
    rate, bandwidth = library.multiply_rate(options.threads), copy_rate()
    print(
        f"{options.threads} threads, {library.instruction_set_name()}: {rate / 1e9:.0f} GFLOP/s"
        f" from registers, {bandwidth / 1e9:.0f} GB/s copying"
    )
    rows = (
        by_length(options.repeats) if options.lengths else table(options.repeats, rate, bandwidth)
    )
    if options.plot:
        (options.plot / "native.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        draw(rows, options.plot)
    hardware = {
        "threads": options.threads,
        "instructions": library.instruction_set_name(),
        "rate": rate,
        "copy": bandwidth,
    }
    print(json.dumps({"torch": torch.__version__, **hardware, "rows": rows}))


if __name__ == "__main__":
    main()
