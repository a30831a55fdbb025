"""The error in the heads of trained models, on their held-out text."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ...models import CumulantForCausalLM
from ...nn import SoftmaxAttention, TaylorAttention
from .cases import LENGTH, Case, measure_orders


@contextmanager
def recorded_heads(model: torch.nn.Module) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Queries and keys of each softmax and Taylor mixer in a call of `model`.

    They are scaled such that scores are q·k / sqrt(K).
    """
    found: dict[str, tuple[Tensor, Tensor]] = {}
    changed = []

    def record(name: str, mixer: SoftmaxAttention | TaylorAttention) -> None:
        attend: Callable[..., object] = mixer.attend

        def attend_and_record(
            query: Tensor, key: Tensor, *rest: object, **options: object
        ) -> object:
            scale = (
                mixer.scale * math.sqrt(query.shape[-1])
                if isinstance(mixer, TaylorAttention)
                else 1.0
            )
            repeat = query.shape[1] // key.shape[1]
            found[name] = query.detach() * scale, key.detach().repeat_interleave(repeat, 1)
            return attend(query, key, *rest, **options)

        mixer.attend = attend_and_record  # type: ignore[method-assign, assignment]
        changed.append(mixer)

    for name, module in model.named_modules():
        if type(module) in (SoftmaxAttention, TaylorAttention):
            record(name, module)
    try:
        yield found
    finally:
        for mixer in changed:
            del mixer.attend


def load_model(folder: str, windows: int) -> tuple[CumulantForCausalLM, Tensor]:
    """A trained model, and the beginning of its held-out text."""
    from ...text.checkpoint import load_checkpoint
    from ...text.tokens import read_tokens

    model, _ = load_checkpoint(folder, "cpu")
    if not (Path(folder) / "tokens" / "tokens.json").is_file():
        raise ValueError(
            f"model: {folder} keeps no held-out text; give the folder of a training run"
        )
    ids = torch.from_numpy(
        read_tokens(Path(folder) / "tokens")[1].ids[: windows * LENGTH].astype("int64")
    )
    if len(ids) < LENGTH:
        raise ValueError(
            f"model: the held-out text of {folder} has {len(ids)} tokens, {LENGTH} are needed"
        )
    return model, ids


def weights_digest(folder: str) -> str:
    """A digest of the weights of a training run."""
    from ...text.checkpoint import checkpoint_folder

    weights = sorted(checkpoint_folder(folder).glob("*.safetensors"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in weights)).hexdigest()[:16]


def trained_cases(folder: str, name: str, seed: int, windows: int = 16) -> list[Case]:
    """Cases of all heads of a trained model's softmax and Taylor mixers.

    They are measured on its held-out text. name: of the model, in the cases.
    """
    model, ids = load_model(folder, windows)
    with torch.inference_mode(), recorded_heads(model) as found:
        model(ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH), use_cache=False)
    if not found:
        raise ValueError(
            f"model: {folder} has no softmax or Taylor mixer; train one with --preset softmax or"
            " taylor"
        )
    generator = torch.Generator().manual_seed(seed)
    cases = []
    for layer, (queries, keys) in found.items():
        for head in range(queries.shape[1]):
            q, k = (x[:, head : head + 1].double() for x in (queries, keys))
            v = torch.randn(*q.shape[:3], 64, generator=generator, dtype=torch.float64)
            where = f"{name}, layer {layer.split('.')[2]} head {head}"
            cases += measure_orders(q, k, v, "trained", where=where)
    return cases


def train_small_model(folder: Path, preset: str, say: Callable[[str], None]) -> str:
    """Train a small model on Python's standard library, or finish it; returns its folder."""
    from ...text.options import TrainingOptions
    from ...text.runs import STARTED
    from ...text.train import train

    output = folder / "models" / preset
    options = TrainingOptions(
        str(output), preset=preset, width=128, depth=3, context=128, batch=16, steps=500
    )
    if (output / STARTED).is_file():
        options = replace(options, resume=True)
    if not (output / "config.json").is_file():
        train(options, say=say)
    return str(output)
