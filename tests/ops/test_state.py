"""States are values: they can be moved, selected, saved and loaded."""

import gc
import json
import subprocess
import sys
import weakref

import pytest
import safetensors.torch
import torch

import cumulant as cm
from cumulant import nn

from .cases import inputs


def a_state(**options):
    return cm.taylor_attention(*inputs(), is_causal=True, return_state=True, **options)[1]


def same(a, b):
    assert type(a) is type(b)
    x, y = a.tensors(), b.tensors()
    return list(x) == list(y) and all(torch.equal(x[n], y[n]) for n in x)


def test_methods():
    state = a_state()
    copy = state.clone()
    assert same(state, copy)
    assert copy.numerator.data_ptr() != state.numerator.data_ptr()
    assert state.to("cpu").numerator.dtype == torch.float64
    assert state.select(torch.tensor([1, 1, 0])).position.tolist() == [37, 37, 37]
    assert state.nbytes == 2 * 2 * 21 * 4 * 8 + 2 * 8
    q, k, v = inputs()
    _, attached = cm.taylor_attention(
        q.requires_grad_(), k.requires_grad_(), v, is_causal=True, return_state=True
    )
    assert attached.numerator.requires_grad
    assert not attached.detach().numerator.requires_grad
    with pytest.raises(AttributeError):
        state.position = None  # frozen


def test_pytree():
    leaves, structure = torch.utils._pytree.tree_flatten(a_state())
    assert len(leaves) == 3
    assert same(torch.utils._pytree.tree_unflatten(leaves, structure), a_state())


@pytest.mark.parametrize("kind", ["linear", "unnormalised", "module", "nested"])
def test_saving_and_loading(tmp_path, kind):
    if kind == "linear":
        state = a_state()
    elif kind == "unnormalised":
        state = cm.linear_attention(*inputs(), normalize=False, is_causal=True, return_state=True)[
            1
        ]
    elif kind == "module":
        state = nn.TaylorAttention(8, 2, conv_size=3, shift_tokens=True)(
            torch.randn(2, 5, 8), return_state=True
        )[1]
    else:
        from cumulant.models import ModelState

        state = ModelState(
            (a_state(), nn.SoftmaxAttention(8, 2)(torch.randn(2, 5, 8), return_state=True)[1]),
            torch.ones(2),
        )
    path = tmp_path / "state.safetensors"
    cm.save_state(path, state, {"note": "kept"})
    loaded, notes = cm.load_state(path, return_metadata=True)
    assert same(loaded, state)
    assert notes == {"note": "kept"}
    assert [p.name for p in tmp_path.iterdir()] == ["state.safetensors"]


def test_a_fresh_process_loads_module_states(tmp_path):
    """The file names its class, so `import cumulant` is enough."""
    state = nn.TaylorAttention(8, 2, conv_size=3)(torch.randn(2, 5, 8), return_state=True)[1]
    cm.save_state(tmp_path / "s", state)
    script = f"import cumulant as cm; print(type(cm.load_state({str(tmp_path / 's')!r})).__name__)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "KernelAttentionState"


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "state.safetensors"
    cm.save_state(path, a_state())
    before = path.read_bytes()

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        cm.save_state(path, a_state(order=1))
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_files_that_are_no_states(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"not a tensor file, but longer than eight bytes")
    with pytest.raises(ValueError, match=r"x.safetensors: not a safetensors file"):
        cm.load_state(path)
    safetensors.torch.save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"but not a state written by cumulant.save_state"):
        cm.load_state(path)
    shape = {
        "kind": "cumulant.ops.state:LinearState",
        "parts": {"numerator": "tensor", "denominator": None, "position": "tensor"},
    }
    safetensors.torch.save_file(
        {"numerator": torch.zeros(1)}, path, {"cumulant.state": json.dumps(shape)}
    )
    with pytest.raises(
        ValueError, match=r"the tensor 'position' of the state is missing; the file is damaged"
    ):
        cm.load_state(path)
    shape["kind"] = "os:Module"
    safetensors.torch.save_file(
        {"numerator": torch.zeros(1)}, path, {"cumulant.state": json.dumps(shape)}
    )
    with pytest.raises(
        ValueError, match=r"a state of a kind this version does not know: 'os:Module'"
    ):
        cm.load_state(path)
    with pytest.raises(FileNotFoundError):
        cm.load_state(tmp_path / "missing.safetensors")
    with pytest.raises(TypeError, match="state: expected a cumulant state, got dict"):
        cm.save_state(path, {})


def test_tensors_are_let_go_at_once():
    """A state's tensors, and the graph behind them, live as long as somebody holds them."""
    q = torch.randn(1, 2, 5, 4, requires_grad=True)
    _, inner = cm.taylor_attention(q, q, q, is_causal=True, return_state=True)
    kept = weakref.ref(inner.numerator)
    gc.disable()
    try:
        assert inner.tensors()["numerator"] is inner.numerator
        large = torch.zeros(3)
        caught = weakref.ref(large)
        inner.map(lambda x, also=large: x)
        del inner, large
        assert caught() is None
        assert kept() is None
    finally:
        gc.enable()
