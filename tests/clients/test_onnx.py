"""onnxruntime runs exported graphs at other lengths and batch sizes, with the same results."""

import logging

import numpy as np
import pytest
import torch
from torch.export import Dim

import cumulant as cm
from cumulant import nn
from cumulant.models import PRESETS, CumulantForMaskedLM, from_preset

from ..models.common import build, tokens
from .test_assisted import HYBRID, llama

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of the exporter
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
ANY = {0: Dim.AUTO, 1: Dim.AUTO}


def small(name):
    if name == "llama":
        return llama().float()
    if name == "hybrid":
        return build("taylor", **HYBRID).float()
    return build(name, num_hidden_layers=3 if name.endswith("based") else 1).float()


def session(module, example, dynamic, path):
    logging.disable(logging.WARNING)
    try:
        torch.onnx.export(
            module.eval(),
            (),
            path,
            kwargs=example,
            dynamic_shapes=dynamic,
            dynamo=True,
            external_data=False,
        )
    finally:
        logging.disable(logging.NOTSET)
    return onnxruntime.InferenceSession(path)


def check_model(model, path):
    """With padding on either side, and hardly any tokens."""
    example = {"input_ids": tokens(2, 11), "attention_mask": torch.ones(2, 11, dtype=torch.long)}
    if not hasattr(model.config, "mixers"):
        example["use_cache"] = False
    dynamic = {name: None if value is False else ANY for name, value in example.items()}
    run = session(model, example, dynamic, path)
    for B, T in ((2, 11), (1, 7), (3, 33), (1, 1), (4, 2)):
        ids, mask = tokens(B, T), torch.ones(B, T, dtype=torch.long)
        mask[0, : T // 3] = 0
        mask[-1, T - T // 4 :] = 0
        out = run.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})[0]
        with torch.no_grad():
            expected = model(ids, attention_mask=mask, use_cache=False).logits
        assert np.abs(out - expected.numpy())[mask.bool().numpy()].max() < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", [*PRESETS, "hybrid", "llama"])
def test_models(name, tmp_path):
    check_model(small(name), tmp_path / "model.onnx")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["taylor", "flash", "softmax"])
def test_encoders(name, tmp_path):
    options = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "vocab_size": 50,
    }
    options |= {
        "group_size": 5,
        "query_key_dim": 12,
        "conv_size": 0,
        "is_causal": False,
        "token_shift": False,
    }
    model = CumulantForMaskedLM(from_preset(name, **options))
    model.config.use_cache = False
    check_model(Plain(model), tmp_path / "model.onnx")


class Plain(torch.nn.Module):
    """A masked language model, which takes no `use_cache`."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, input_ids, attention_mask, use_cache=False):
        return self.model(input_ids, attention_mask=attention_mask)


CALLS = {
    "elita": lambda q, k, v, mask: cm.elita_attention(
        k[..., 0], q[..., 0], q[..., 1], v, key_mask=mask
    ),
    "linear": lambda q, k, v, mask: cm.linear_attention(q, k, v, is_causal=True, key_mask=mask),
    "relu": lambda q, k, v, mask: cm.linear_attention(
        q, k, v, "relu", is_causal=True, key_mask=mask
    ),
    "identity": lambda q, k, v, mask: cm.linear_attention(
        q.abs() + 0.1, k.abs() + 0.1, v, "identity", key_mask=mask
    ),
    "softmax features": lambda q, k, v, mask: cm.linear_attention(q, k, v, "softmax"),
    "taylor": lambda q, k, v, mask: cm.taylor_attention(q, k, v, is_causal=True, key_mask=mask),
    "order 3": lambda q, k, v, mask: cm.taylor_attention(q, k, v, 3),
    "gated": lambda q, k, v, mask: cm.gated_attention(q, k, v, is_causal=True, key_mask=mask),
    "mixed chunk": lambda q, k, v, mask: cm.mixed_chunk_attention(
        q, k, q * 2, k * 2, v, group_size=4, is_causal=True, key_mask=mask
    ),
}


class Operations(torch.nn.Module):
    def __init__(self, *names):
        super().__init__()
        self.names = names

    def forward(self, q, k, v, mask):
        return tuple(CALLS[name](q, k, v, mask) for name in self.names)


def inputs(B, T):
    q, k, v = torch.randn(B, 4, T, 6), torch.randn(B, 2, T, 6), torch.randn(B, 2, T, 5)
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[0, : T // 3] = False
    return {"q": q, "k": k, "v": v, "mask": mask}


@pytest.mark.parametrize(
    "names",
    [["linear", "relu", "identity"], pytest.param([*CALLS], marks=pytest.mark.slow)],
    ids=["linear", "all"],
)
def test_operations(names, tmp_path):
    heads = {0: Dim.AUTO, 2: Dim.AUTO}
    dynamic = {"q": heads, "k": heads, "v": heads, "mask": ANY}
    operations = Operations(*names)
    run = session(operations, inputs(2, 9), dynamic, tmp_path / "operations.onnx")
    for B, T in ((2, 9), (1, 3), (3, 20)):
        given = inputs(B, T)
        found = run.run(
            None, {name: given[name].numpy() for name in (i.name for i in run.get_inputs())}
        )
        for x, y in zip(found, operations(**given), strict=True):
            assert np.abs(x - y.numpy()).max() < 1e-4


class Step(torch.nn.Module):
    """A token onto a state."""

    def __init__(self):
        super().__init__()
        self.mixer = nn.TaylorAttention(16, 2, head_dim=4, conv_size=3, rotary=True)

    def forward(self, x, numerator, denominator, conv, position):
        sums = cm.LinearState(numerator, denominator, position)
        state = nn.KernelAttentionState(sums, None, conv)
        y, state = self.mixer(x, state=state, return_state=True)
        return y, state.sums.numerator, state.sums.denominator, state.conv, state.position


@pytest.mark.slow
def test_steps_with_states_as_inputs(tmp_path):
    step = Step()
    with torch.no_grad():
        _, state = step.mixer(torch.randn(2, 5, 16), return_state=True)
    parts = {
        "numerator": state.sums.numerator,
        "denominator": state.sums.denominator,
        "conv": state.conv,
        "position": state.position,
    }
    run = session(step, {"x": torch.randn(2, 1, 16), **parts}, None, tmp_path / "step.onnx")
    for _ in range(3):
        given = {"x": torch.randn(2, 1, 16), **parts}
        found = run.run(None, {name: x.numpy() for name, x in given.items()})
        with torch.no_grad():
            expected = step(**given)
        for x, y in zip(found, expected, strict=True):
            assert np.abs(x - y.numpy()).max() < 1e-4
        parts = dict(zip(parts, map(torch.from_numpy, found[1:]), strict=True))


QUICK = ["flash", "elita"]  # the others hold fewer kinds of operators, or many layers
SLOW = [
    pytest.param(name, marks=pytest.mark.slow) for name in [*PRESETS, "hybrid"] if name not in QUICK
]


@pytest.mark.parametrize("name", [*QUICK, *SLOW])
def test_graphs_for_onnx_hold_pytorchs_operators_alone(name, monkeypatch):
    """And those for anything else keep ours."""
    model, ids = small(name), tokens(2, 9)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    ours = []
    for to_onnx in (True, False):
        monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda is_so=to_onnx: is_so)
        graph = torch.export.export(
            model, (), given, dynamic_shapes=dict.fromkeys(given, ANY)
        ).graph
        called = {
            node.target.namespace
            for node in graph.nodes
            if isinstance(node.target, torch._ops.OpOverload)
        }
        ours.append("cumulant" in called)
    assert ours == [False, name != "softmax"]


def test_implementations_that_onnx_has_not(monkeypatch):
    q = torch.randn(1, 2, 5, 4)
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)

    class Asked(torch.nn.Module):
        def forward(self, q):
            return cm.linear_attention(q, q, q, impl="torch")

    with pytest.raises(
        ValueError, match="impl: 'torch' runs operators that ONNX does not know; use 'auto'"
    ):
        torch.export.export(Asked(), (q,))
