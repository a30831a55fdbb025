"""`cumulant bench approximation`: how far Taylor attention is from softmax attention, by order, size of the scores,
head dim, alpha, and in trained models.

The error of a case is ``||taylor - softmax|| / ||softmax||`` over all outputs, causal, with values drawn independently
of the keys. "Order 0", plain averaging of the values seen, is the mark that any approximation must beat. The size of
the scores is their root mean square over the pairs of query and key that see each other: the expansion is around 0.
"""

from __future__ import annotations

import hashlib
import math
import shutil
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F

from ..models import CumulantForCausalLM
from ..nn import SoftmaxAttention, TaylorAttention
from ..ops.taylor import taylor_attention
from .folder import Folder
from .page import Page, Picture, TableOf, write

ORDERS = (0, 1, 2, 3, 4)
SIZES = (0.125, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)
DIMS = (4, 8, 16, 32, 64)
ALPHAS = (0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
TRAINED = ("softmax", "taylor")  # presets of the models that it trains
LENGTH = 128  # tokens: one chunk of the torch implementation, so that any order is computed without features


@dataclass(frozen=True)
class Case:
    """One measurement. `kind`: "random" (Gaussian q and k), "normalised" (the same after LayerNorm, scores divided by
    ``alpha · sqrt(K)``) or "trained". `size`: root mean square of the scores. `error`: see this module's docstring."""

    kind: str
    order: int
    head_dim: int
    size: float
    error: float
    alpha: float | None = None
    where: str | None = None


def exact(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)


def approximate(query: Tensor, key: Tensor, value: Tensor, order: int) -> Tensor:
    """Causal Taylor attention; order 0 is the mean of the values so far."""
    if order == 0:
        count = torch.arange(1, value.shape[2] + 1, dtype=value.dtype, device=value.device)
        return value.cumsum(2) / count[:, None]
    out = taylor_attention(query, key, value, order, is_causal=True, impl="torch")
    assert isinstance(out, Tensor)
    return out


def measure(
    query: Tensor, key: Tensor, value: Tensor, kind: str, *, alpha: float | None = None, where: str | None = None
) -> list[Case]:
    """A case for each order; scores are q·k / sqrt(K)."""
    dim = query.shape[-1]
    expected = exact(query, key, value)
    scores = (query @ key.mT / math.sqrt(dim))[..., torch.ones(LENGTH, LENGTH).tril().bool()]
    size = float(scores.square().mean().sqrt())
    cases = []
    for order in ORDERS:
        error = float((approximate(query, key, value, order) - expected).norm() / expected.norm())
        cases.append(Case(kind, order, dim, size, error, alpha, where))
    return cases


def random_cases(seed: int) -> list[Case]:
    """Gaussian queries and keys whose scores have every size, then of every head dim, then normalised."""
    generator = torch.Generator().manual_seed(seed)

    def draw(dim: int, batch: int = 16) -> Tensor:
        return torch.randn(batch, 1, LENGTH, dim, generator=generator, dtype=torch.float64)

    cases = []
    for dim in DIMS:
        q, k, v = draw(dim), draw(dim), draw(64)
        for size in SIZES:
            cases += measure(q * size, k, v, "random")
        q, k = F.layer_norm(q, (dim,)), F.layer_norm(k, (dim,))
        for alpha in ALPHAS:
            cases += measure(q / alpha, k, v, "normalised", alpha=alpha)
    return cases


@contextmanager
def recorded(model: torch.nn.Module) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Queries and keys of each softmax and Taylor mixer in a call of `model`, such that scores are q·k / sqrt(K)."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    changed = []

    def watch(name: str, mixer: SoftmaxAttention | TaylorAttention) -> None:
        attend: Callable[..., object] = mixer.attend

        def watched(query: Tensor, key: Tensor, *rest: object, **options: object) -> object:
            scale = mixer.scale * math.sqrt(query.shape[-1]) if isinstance(mixer, TaylorAttention) else 1.0
            repeat = query.shape[1] // key.shape[1]
            found[name] = query.detach() * scale, key.detach().repeat_interleave(repeat, 1)
            return attend(query, key, *rest, **options)

        mixer.attend = watched  # type: ignore[method-assign, assignment]
        changed.append(mixer)

    for name, module in model.named_modules():
        if type(module) in (SoftmaxAttention, TaylorAttention):
            watch(name, module)
    try:
        yield found
    finally:
        for mixer in changed:
            del mixer.attend


def load(folder: str, windows: int) -> tuple[CumulantForCausalLM, Tensor]:
    """A trained model, and the beginning of its held-out text."""
    from ..text.checkpoint import load_checkpoint
    from ..text.tokens import read_tokens

    model, _ = load_checkpoint(folder, "cpu")
    if not (Path(folder) / "tokens" / "tokens.json").is_file():
        raise ValueError(f"model: {folder} keeps no held-out text; give the folder of a training run")
    ids = torch.from_numpy(read_tokens(Path(folder) / "tokens")[1].ids[: windows * LENGTH].astype("int64"))
    if len(ids) < LENGTH:
        raise ValueError(f"model: the held-out text of {folder} has {len(ids)} tokens, {LENGTH} are needed")
    return model, ids


def digest(folder: str) -> str:
    """Of the weights."""
    from ..text.checkpoint import checkpoint_folder

    weights = sorted(checkpoint_folder(folder).glob("*.safetensors"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in weights)).hexdigest()[:16]


def trained_cases(folder: str, name: str, seed: int, windows: int = 16) -> list[Case]:
    """Every head of the softmax and Taylor mixers of a trained model, called `name`, on its held-out text."""
    model, ids = load(folder, windows)
    with torch.inference_mode(), recorded(model) as found:
        model(ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH), use_cache=False)
    if not found:
        raise ValueError(f"model: {folder} has no softmax or Taylor mixer; train one with --preset softmax or taylor")
    generator = torch.Generator().manual_seed(seed)
    cases = []
    for layer, (queries, keys) in found.items():
        for head in range(queries.shape[1]):
            q, k = (x[:, head : head + 1].double() for x in (queries, keys))
            v = torch.randn(*q.shape[:3], 64, generator=generator, dtype=torch.float64)
            where = f"{name}, layer {layer.split('.')[2]} head {head}"
            cases += measure(q, k, v, "trained", where=where)
    return cases


def summary(cases: list[Case]) -> list[tuple[str, list[float]]]:
    """Rows of the table: a setting, and its error at each order."""

    def row(chosen: list[Case]) -> list[float]:
        return [statistics.median([c.error for c in chosen if c.order == order]) for order in ORDERS]

    random = [c for c in cases if c.kind == "random" and c.head_dim == 16]
    rows = []
    for i, size in enumerate(SIZES):  # the cases lie in the order of SIZES
        rows.append((f"random, size {size:g}", row(random[len(ORDERS) * i : len(ORDERS) * (i + 1)])))
    for dim in (16, 64):
        for alpha in (1.0, 3.0):
            chosen = [c for c in cases if c.kind == "normalised" and c.head_dim == dim and c.alpha == alpha]
            rows.append((f"LayerNorm, K={dim}, α={alpha:g}", row(chosen)))
    trained = [c for c in cases if c.kind == "trained"]
    for name in dict.fromkeys((c.where or "").rpartition(" head ")[0] for c in trained):
        chosen = [c for c in trained if (c.where or "").startswith(f"{name} head")]
        size = statistics.median([c.size for c in chosen])
        rows.append((f"{name}, size {size:.2g}", row(chosen)))
    return rows


def percent(error: float) -> str:
    """Three digits, or what an unbounded error comes to."""
    return f"{100 * error:.3g}%" if error < 10 else "> 1000%"


def train_small(folder: Path, preset: str, say: Callable[[str], None]) -> str:
    """The folder of a small model trained on Python's standard library: now, or to its end if that is not reached."""
    from ..text.options import TrainingOptions
    from ..text.runs import STARTED
    from ..text.train import train

    output = folder / "models" / preset
    options = TrainingOptions(str(output), preset=preset, width=128, depth=3, context=128, batch=16, steps=500)
    if (output / STARTED).is_file():
        options = replace(options, resume=True)
    if not (output / "config.json").is_file():
        train(options, say=say)
    return str(output)


def run(output: str, models: list[str], *, quick: bool, seed: int, force: bool, console: Console) -> Folder:
    """Measure what is not there yet, and draw the report."""
    from .plots import pyplot

    pyplot()  # refuses at once, not after training
    for given in models:  # mistakes before anything is measured
        load(given, 1)
    wanted = models or ([] if quick else list(TRAINED))
    digests = [digest(model) for model in models]
    settings = {"models": wanted, "digests": digests, "seed": seed}
    folder = Folder.start(output, "bench approximation", settings, force=force)
    done = {row["model"] for row in folder.rows()}
    if not done:
        shutil.rmtree(folder.path / "models", ignore_errors=True)
    try:
        for model in (None, *wanted):
            if model not in done:
                if model is None:
                    cases = random_cases(seed)
                elif models:
                    cases = trained_cases(model, model, seed)
                else:
                    trained = train_small(
                        folder.path, model, lambda line: console.print(line, style="dim", soft_wrap=True)
                    )
                    cases = trained_cases(trained, model, seed)
                folder.append(*({"model": model, **asdict(case)} for case in cases))
    finally:
        if folder.rows():
            report(folder, console)
    return folder


def report(folder: Folder, console: Console | None = None) -> Page:
    """Pictures and page from the folder's rows."""
    from .approximation_plots import draw_error, draw_exponential

    cases = [Case(**{name: value for name, value in row.items() if name != "model"}) for row in folder.rows()]
    rows = summary(cases)
    one, two = (dict(rows)[f"random, size {size}"] for size in (1, 2))
    page = Page(
        "How near Taylor attention comes to softmax attention",
        [
            f"Taylor attention of order 2 is {percent(one[2])} from softmax attention at scores of size 1 and "
            f"{percent(two[2])} at 2; order 4 is {percent(one[4])} and {percent(two[4])}."
        ],
        [
            TableOf(
                "Error",
                ("q and k, size of scores", *("averaging" if o == 0 else f"order {o}" for o in ORDERS)),
                [(name, *(percent(error) for error in errors)) for name, errors in rows],
            )
        ],
        [
            Picture(draw_exponential(folder.path), "The exponential and its Taylor expansions"),
            Picture(draw_error(cases, folder.path), "Error of the output against softmax attention"),
        ],
        [
            f"||taylor - softmax|| / ||softmax|| over the outputs of causal attention on {LENGTH} tokens, with values "
            "independent of the keys. Size: root mean square of the scores. Averaging, the mean of the values so far, "
            "is what an approximation must beat to be one at all. Trained models: medians over the heads of a layer.",
        ],
    )
    write(folder, page, console)
    return page
