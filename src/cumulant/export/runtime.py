"""An exported model in onnxruntime, with its states."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


class OnnxModel:
    """The graphs of `export_onnx` in onnxruntime on the CPU, and the states after what was read.

    Args:
        folder: written by `export_onnx`.
        threads: of onnxruntime, by default as many as there are cores.
    """

    def __init__(self, folder: str | os.PathLike[str], threads: int = 0):
        import onnxruntime

        place = Path(folder)
        self.description: dict[str, Any] = json.loads(
            (place / "cumulant_onnx.json").read_text(encoding="utf-8")
        )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self._prompt, self._step = (
            onnxruntime.InferenceSession(
                place / self.description[name], options, providers=["CPUExecutionProvider"]
            )
            for name in ("prompt", "step")
        )
        self.states: dict[str, NDArray[Any]] = {}

    def reset(self, batch: int = 1) -> None:
        """Forget what was read, for a batch of `batch` rows."""
        sizes = {"B": batch, "S": 0}
        self.states = {
            state["input"]: np.full(
                [sizes.get(size, size) for size in state["shape"]],
                float(state["initial"]),
                state["dtype"],
            )
            for state in self.description["states"]
        }

    def read(self, ids: NDArray[Any], *, logits_to_keep: int = 1) -> NDArray[Any]:
        """Logits ``[B, N, vocab_size]`` after ``ids [B, T]``, which follow what was read before.

        logits_to_keep: the number N of last tokens with logits; 0: all.
        """
        if ids.ndim != 2 or ids.shape[1] < 1 or ids.dtype.kind not in "iu":
            raise ValueError(
                f"ids: expected integers [B, T] with T at least 1, got {list(ids.shape)} in"
                f" {ids.dtype}"
            )
        if not self.states:
            self.reset(ids.shape[0])
        given: dict[str, NDArray[Any]] = {"input_ids": ids.astype(np.int64), **self.states}
        session = self._step
        if ids.shape[1] > 1:
            session, given["logits_to_keep"] = self._prompt, np.array([logits_to_keep])
        logits, *after = session.run(None, given)
        self.states = dict(zip(self.states, after, strict=True))
        found: NDArray[Any] = logits
        return found
