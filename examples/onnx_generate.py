"""Generate text with an exported model, without torch: onnx_generate.py FOLDER PROMPT TOKENS."""

import json
import sys
from pathlib import Path

import numpy as np


def generate(folder: Path, prompt: str, count: int) -> str:
    """The prompt and the `count` likeliest tokens behind it."""
    from onnxruntime import InferenceSession
    from tokenizers import Tokenizer

    about = json.loads((folder / "cumulant_onnx.json").read_text())
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    read, step = (InferenceSession(folder / about[name]) for name in ("prompt", "step"))
    past = {}
    for state in about["states"]:  # before the first token
        shape = [{"B": 1, "S": 0}.get(size, size) for size in state["shape"]]
        past[state["input"]] = np.full(shape, float(state["initial"]), state["dtype"])
    ids = np.array([tokenizer.encode(prompt, add_special_tokens=False).ids])
    logits, *new = read.run(None, {"input_ids": ids, "logits_to_keep": np.array([1]), **past})
    for _ in range(count):
        logits[..., about["suppress_tokens"]] = -np.inf  # ids that stand for no token
        ids = np.append(ids, logits[:, -1].argmax(-1, keepdims=True), 1)
        past = dict(zip(past, new, strict=True))
        logits, *new = step.run(None, {"input_ids": ids[:, -1:], **past})
    return tokenizer.decode(ids[0])


if __name__ == "__main__":
    print(generate(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])))
