"""The columns of onnxruntime in `cumulant bench`."""

from __future__ import annotations

import io
from dataclasses import replace
from importlib.metadata import PackageNotFoundError

import pytest
import torch
from rich.console import Console

from cumulant.bench.speed import onnxruntime_calls as calls
from cumulant.bench.speed.measure import run
from cumulant.bench.speed.recipes import FAIR, RECIPES, Recipe
from cumulant.bench.speed.subjects import SUBJECTS, Shape
from cumulant.bench.speed.verdicts import PASSES

NAMES = ["softmax, onnxruntime", "linear, onnxruntime"]
TINY = Recipe(("linear", *NAMES), PASSES, (8, 16), heads=2, dim=8, repeats=3, budget=0.01)


@pytest.fixture
def installed():
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    if calls.missing_packages():
        pytest.skip(calls.missing_packages())


def random(*sizes):
    B, H, T, K = sizes
    return torch.randn(B, T, H, K).transpose(1, 2)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("gated", [False, True])
def test_linear_attention(gated):
    """Outputs and state are the recurrence's, from a state on; the state given is not changed."""
    B, H, T, K, V = 2, 3, 20, 8, 16
    q, k, v, state = random(B, H, T, K), random(B, H, T, K), random(B, H, T, V), None
    decay = -torch.rand(B, H, T) if gated else None
    want, rows = torch.randn(B, H, K, V, dtype=torch.float64), []
    state = want.float()
    before = state.clone()
    call = calls.linear_call(q, k, v, state, log_decay=decay)
    for t in range(T):
        if gated:
            want = want * decay[:, :, t, None, None].double().exp()
        want = want + k[:, :, t, :, None].double() * v[:, :, t, None]
        rows.append(torch.einsum("bhk,bhkv->bhv", q[:, :, t].double(), want))
    for _ in range(2):  # a second call computes the same
        out, after = call()
        torch.testing.assert_close(out.double(), torch.stack(rows, 2), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(after.double(), want, rtol=1e-4, atol=1e-4)
    assert torch.equal(state, before)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(("batch", "queries"), [(2, 1), (1, 5), (2, 20)])
def test_softmax_attention(batch, queries):
    """The last queries of a context see what PyTorch's see."""
    q, k, v = (random(batch, 3, 20, 8) for _ in range(3))
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    call = calls.softmax_call(q[:, :, -queries:], k, v)
    for _ in range(2):
        torch.testing.assert_close(call()[0], want[:, :, -queries:])


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("name", NAMES)
def test_a_step_is_the_last_token_of_a_whole(name):
    shape = Shape(2, 4, 12, 8, torch.float32, "cpu")
    subject = SUBJECTS[name]
    torch.manual_seed(1)
    step, held = subject.step(shape)
    assert step()[0].shape == (2, 4, 1, 8)
    assert held == 4 * 2 * 4 * (8 * 8 if name.startswith("linear") else 2 * 12 * 8)
    assert subject.forward(shape)()[0].shape == (2, 4, 12, 8)


@pytest.mark.usefixtures("installed")
def test_a_run(tmp_path):
    """There is no training, and the page says what the operators lack."""
    console = Console(file=io.StringIO())
    folder = run(TINY, str(tmp_path), device="cpu", threads=1, force=False, console=console)
    rows = folder.rows()
    assert all(row["status"] == "measured" and row["low"] > 0 for row in rows)
    assert {row["pass"] for row in rows if row["mechanism"] in NAMES} == {"forward", "decode"}
    page = (tmp_path / "report.md").read_text()
    assert "no feature map and no normaliser" in page.replace("\n", " ")
    training = page.split("training, milliseconds")[1].split("decode, milliseconds")[0]
    assert "onnxruntime" not in training


def test_they_are_part_of_the_fair_comparison():
    assert set(NAMES) <= set(FAIR)
    assert not any("onnxruntime" in n for n in RECIPES["implementations"].mechanisms)


@pytest.mark.parametrize(
    ("versions", "missing"),
    [
        ({}, "onnx>=1.23 and onnxruntime>=1.32"),
        ({"onnx": "1.23.0", "onnxruntime": "1.31.2"}, "onnxruntime>=1.32"),
        ({"onnx": "1.9.0", "onnxruntime": "1.32.0"}, "onnx>=1.23"),
        ({"onnx": "1.23.2", "onnxruntime": "2.0"}, None),
    ],
)
def test_without_the_packages(versions, missing, tmp_path, monkeypatch):
    """The rest is measured as before, and a mechanism that was named is refused."""

    def version(name):
        if name not in versions:
            raise PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(calls, "version", version)
    assert calls.missing_packages() == missing
    assert TINY.obstacles("cpu") == (dict.fromkeys(NAMES, missing) if missing else {})
    if missing:
        assert TINY.possible("cpu") == replace(TINY, mechanisms=("linear",))
        with pytest.raises(ValueError, match="mechanism: softmax, onnxruntime needs onnx"):
            run(TINY, str(tmp_path), device="cpu", threads=1, force=False, console=Console())


@pytest.mark.parametrize("fields", [{"dtype": "bf16"}, {"causal": False}])
def test_only_causal_attention_in_fp32_on_the_cpu(fields):
    found = replace(TINY, **fields).obstacles("cpu")
    assert found == dict.fromkeys(NAMES, "causal attention in fp32 on the CPU")
    assert set(TINY.obstacles("cuda")) == set(NAMES)
