"""ELiTA's TensorFlow layers (Sharma 2023): Attention2 and FeedForward2."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import ElitaAttention, ElitaFeedForward

# arrays of a layer, and their shapes in letters
ATTENTION = {
    "k1": "H D",
    "k2": "H D",
    "a1": "H M 1",
    "b1": "H M 1",
    "a2": "H M 1",
    "b2": "H M 1",
    "c": "H M 1",
    "value_weight": "H D V",
    "output_weight": "H D V",
}
FEED_FORWARD = {"w1": "D A", "w2": "D F", "w3": "A F D", "b1": "A", "b2": "F", "b3": "D"}


def from_elita(
    weights: Mapping[str, Any] | str | os.PathLike[str],
    *,
    prefix: str = "",
    horizon: float | None = None,
    time: float = 1.0,
    compatible: bool = False,
) -> nn.Module:
    """An `ElitaAttention` or an `ElitaFeedForward` with the arrays of ELiTA's TensorFlow layer.

    Args:
        weights: arrays by the layer's names, as NumPy or torch, or an .npz archive of them.
            Attention has k1, k2 and possibly k3 ``[H, D]``, a1, b1, a2, b2, c ``[H, M, 1]``,
            value_weight and output_weight ``[H, D, V]``. A feed-forward has w1 ``[D, A]``, w2
            ``[D, F]``, w3 ``[A, F, D]``, b1, b2, b3. A prefix up to the last "/" of a name and
            TensorFlow's ":0" after it are ignored.
        prefix: of the names to take from an archive with several layers, such as "attention2_1/".
        horizon: of attention: the length of the training sequences less one; needed unless
            `compatible`.
        time: see `cumulant.nn.ElitaAttention`.
        compatible: the original's numbers on sequences of any length: positions from 0 to 1 over
            its input, and logits clipped to ±20. Such a layer has no state.

    Raises:
        ValueError: an array is missing, misshapen or too many, or `horizon` is missing, which the
            weights do not determine.
    """
    found = _named_arrays(weights, prefix)
    if not found.keys() & {"w1", "w2", "w3"}:
        if compatible == (horizon is not None):
            raise ValueError(
                "horizon: the weights do not tell it; give horizon=(training length - 1), or"
                " compatible=True"
                if horizon is None
                else (
                    "horizon: with compatible=True positions follow each sequence's own length;"
                    " leave it out"
                )
            )
        return _attention(
            found, None if compatible else horizon, time, 20.0 if compatible else None
        )
    if horizon is not None or compatible:
        raise ValueError(
            f"{'horizon' if compatible is False else 'compatible'}: a feed-forward has no positions"
        )
    return _feed_forward(found)


def _named_arrays(
    weights: Mapping[str, Any] | str | os.PathLike[str], prefix: str
) -> dict[str, Tensor]:
    if isinstance(weights, Mapping):
        given = dict(weights)
    elif isinstance(weights, (str, os.PathLike)):
        given = _read_archive(weights)
    else:
        raise TypeError(
            f"weights: expected arrays by name or an .npz file, got {type(weights).__name__}"
        )
    found: dict[str, Tensor] = {}
    for name, x in given.items():
        if not name.startswith(prefix):
            continue
        short = name.removesuffix(":0").rpartition("/")[2]
        if short in found:
            raise ValueError(
                f"weights: more than one {short!r}, in {name!r} the second; choose a layer with"
                " prefix=..."
            )
        found[short] = _copy_tensor(short, x)
    if not found:
        raise ValueError(
            f"weights: no arrays{f' whose names begin with {prefix!r}' if prefix else ''}"
        )
    return found


def _copy_tensor(name: str, x: Any) -> Tensor:
    """A copy of the array, since the original may be read-only."""
    import numpy as np

    try:
        return x.detach().clone() if isinstance(x, Tensor) else torch.from_numpy(np.array(x))
    except (TypeError, ValueError) as error:
        raise ValueError(f"weights: {name}: not an array of numbers: {error}") from error


def _read_archive(path: str | os.PathLike[str]) -> dict[str, Any]:
    import zipfile

    import numpy as np

    try:
        with np.load(path) as archive:
            return {name: archive[name] for name in archive.files}
    except (ValueError, zipfile.BadZipFile, AttributeError, TypeError, EOFError) as error:
        raise ValueError(
            f"weights: {os.fspath(path)} is not an .npz archive of arrays: {error}"
        ) from error


def _check_arrays(found: dict[str, Tensor], expected: dict[str, str], layer: str) -> dict[str, int]:
    """The sizes of the letters, after all arrays are found and fit one another."""
    sizes: dict[str, int] = {"1": 1}
    for name, letters in expected.items():
        if name not in found:
            raise ValueError(
                f"weights: {name!r} of ELiTA's {layer} is missing; found {', '.join(sorted(found))}"
            )
        x, dims = found[name], letters.split()
        known = [sizes.get(d, d) for d in dims]
        wrong = x.dim() != len(dims) or any(
            isinstance(k, int) and k != n for k, n in zip(known, x.shape, strict=True)
        )
        if x.dtype != found[next(iter(expected))].dtype:
            raise ValueError(
                f"weights: {name}: expected {found[next(iter(expected))].dtype} as the others, got"
                f" {x.dtype}"
            )
        if wrong or not x.is_floating_point():
            shape = f"[{', '.join(dims)}] = [{', '.join(map(str, known))}]"
            raise ValueError(
                f"weights: {name}: expected floats {shape}, got {x.dtype} {list(x.shape)}"
            )
        sizes |= dict(zip(dims, x.shape, strict=True))
    extra = sorted(set(found) - set(expected))
    if extra:
        raise ValueError(f"weights: {extra[0]!r} has no place in ELiTA's {layer}")
    return sizes


def _attention(
    found: dict[str, Tensor], horizon: float | None, time: float, clip: float | None
) -> nn.Module:
    keys = [name for name in ("k1", "k2", "k3") if name in found]
    expected = ATTENTION | ({"k3": "H D"} if "k3" in found else {})
    n = _check_arrays(found, expected, "Attention2")
    module = ElitaAttention(
        n["D"],
        n["H"],
        head_dim=n["V"],
        features=n["M"],
        horizon=horizon,
        time=time,
        query_logit="k3" in found,
        clip=clip,
    )
    return _load_arrays(
        module,
        {
            "logit_proj.weight": torch.cat([found[name] for name in keys]),
            "v_proj.weight": found["value_weight"].transpose(1, 2).flatten(0, 1),
            "out_proj.weight": found["output_weight"].transpose(0, 1).flatten(1),
            **{f"position.{name}": found[name][..., 0] for name in ("a1", "b1", "a2", "b2", "c")},
        },
    )


def _feed_forward(found: dict[str, Tensor]) -> nn.Module:
    n = _check_arrays(found, FEED_FORWARD, "FeedForward2")
    return _load_arrays(
        ElitaFeedForward(n["D"], n["A"], factor=n["F"]),
        {
            "hidden_proj.weight": found["w1"].T,
            "hidden_proj.bias": found["b1"],
            "factor_proj.weight": found["w2"].T,
            "factor_proj.bias": found["b2"],
            "out_proj.weight": found["w3"].permute(2, 1, 0).flatten(1),
            "out_proj.bias": found["b3"],
        },
    )


def _load_arrays(module: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    copies = {name: x.clone(memory_format=torch.contiguous_format) for name, x in weights.items()}
    module.load_state_dict(copies, assign=True)
    return module
