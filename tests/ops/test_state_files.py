"""How states print, and files that cannot be written or read."""

import json
import os
import resource
import subprocess
import sys

import pytest
import safetensors.torch
import torch

import cumulant as cm
import cumulant.serving.library
from cumulant import nn
from cumulant.models import ModelState

from .cases import inputs

# Files store a state's class under these names, and its tensors under the names of the fields.
# A class that moves must stay importable under its old name, so that older files load.
STORED_CLASSES = {
    "cumulant.serving.library:Document": "tokens border end",
    "cumulant.serving.snapshots:Snapshot": "state logits",
    "cumulant.ops.state:LinearState": "numerator denominator position",
    "cumulant.ops.state:KeyValueState": "key value mask position",
    "cumulant.ops.state:MixedChunkState": "numerator quad_key lin_key value position",
    "cumulant.ops.state:ElitaState": "log_weight mean position",
    "cumulant.nn.kernel_attention:KernelAttentionState": "sums shift conv",
    "cumulant.nn.mixed_chunk:MixedChunkAttentionState": "groups shift",
    "cumulant.nn.short_convolution:ConvolutionState": "tail position",
    "cumulant.models.cache:ModelState": "layers position",
}


def a_state():
    return cm.taylor_attention(*inputs(), is_causal=True, return_state=True)[1]


def test_a_state_prints_shapes_not_numbers():
    state = a_state()
    assert (
        repr(state) == "LinearState(numerator=float64[2, 2, 21, 3], denominator=float64[2, 2, 21],"
        f" position=[37, 37]; {state.nbytes:,} bytes)"
    )
    many = state.select(torch.zeros(100, dtype=torch.int64))
    assert "position=int64[100]" in repr(many)
    assert len(repr(many)) < 200
    layer = nn.TaylorAttention(64, 4, conv_size=4)(torch.randn(1, 5, 64), return_state=True)[1]
    other = nn.SoftmaxAttention(8, 2)(torch.randn(1, 5, 8), return_state=True)[1]
    whole = repr(ModelState((layer, other) * 12, torch.tensor([5])))
    assert "12 x KernelAttentionState(sums=LinearState(" in whole
    assert "12 x KeyValueState(" in whole
    assert len(whole) < 500
    assert "position=int64[2]" in repr(state.to("meta"))


def state_classes(base=cm.State):
    """All state classes of the package; the modules imported here define every one."""
    for kind in base.__subclasses__():
        yield from state_classes(kind)
        if kind.__module__.startswith("cumulant."):
            yield kind


def test_every_state_class_has_its_listed_name():
    names = {f"{kind.__module__}:{kind.__name__}" for kind in state_classes()}
    assert names <= STORED_CLASSES.keys()


@pytest.mark.parametrize("kind", STORED_CLASSES)
def test_files_of_earlier_versions_load(kind, tmp_path):
    tensors = {field: torch.ones(1) for field in STORED_CLASSES[kind].split()}
    structure = json.dumps({"kind": kind, "parts": dict.fromkeys(tensors, "tensor")})
    safetensors.torch.save_file(tensors, tmp_path / "s", {"cumulant.state": structure})
    state = cm.load_state(tmp_path / "s")
    assert type(state).__name__ == kind.partition(":")[2]
    assert state.tensors() == tensors


def test_a_state_prints_under_torch_func():
    """Where there are no numbers to read."""
    state = a_state()

    def print_it(position):
        assert "position=int64[2]" in repr(
            cm.LinearState(state.numerator, state.denominator, position)
        )
        return position

    torch.func.vmap(print_it)(state.position.expand(3, 2))


def test_a_link_is_followed(tmp_path):
    """The file behind a link is replaced or made, and the link stays."""
    (tmp_path / "there").mkdir()
    for name in ("there/old", "there/new"):
        if name.endswith("old"):
            (tmp_path / name).write_bytes(b"old")
        link = tmp_path / "link"
        link.unlink(missing_ok=True)
        link.symlink_to(tmp_path / name)
        cm.save_state(link, a_state())
        assert link.is_symlink()
        assert torch.equal(cm.load_state(tmp_path / name).numerator, a_state().numerator)
    assert sorted(p.name for p in (tmp_path / "there").iterdir()) == ["new", "old"]


def test_places_that_hold_no_file(tmp_path):
    with pytest.raises(IsADirectoryError, match="is a folder; name a file"):
        cm.save_state(tmp_path, a_state())
    with pytest.raises(FileNotFoundError, match="expected the name of a file"):
        cm.save_state("", a_state())
    with pytest.raises(FileNotFoundError, match=r"no such folder: .*/missing"):
        cm.save_state(tmp_path / "missing" / "s", a_state())
    with pytest.raises(OSError, match="not a regular file"):
        cm.save_state("/dev/null", a_state())
    with pytest.raises(IsADirectoryError, match="is a folder; name the file"):
        cm.load_state(tmp_path)
    assert os.path.exists("/dev/null")
    assert not os.path.isfile("/dev/null")
    assert list(tmp_path.iterdir()) == []
    long = tmp_path / ("s" * 250)
    cm.save_state(long, a_state())
    assert [p.name for p in tmp_path.iterdir()] == [long.name]


def test_metadata_are_strings(tmp_path):
    for wrong in ({"steps": 3}, {3: "steps"}, {"a": None}):
        with pytest.raises(TypeError, match="metadata: expected strings, got"):
            cm.save_state(tmp_path / "s", a_state(), wrong)
    with pytest.raises(ValueError, match="metadata: the key 'cumulant.state' is reserved"):
        cm.save_state(tmp_path / "s", a_state(), {"cumulant.state": "mine"})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "structure",
    ["", "{", "[]", "3", '"tensor"', "null", '{"kind": 3}', '{"kind": "cumulant.ops.state:State"}'],
)
def test_structures_that_are_none(structure, tmp_path):
    path = tmp_path / "s"
    safetensors.torch.save_file({"numerator": torch.zeros(1)}, path, {"cumulant.state": structure})
    with pytest.raises(ValueError, match=r"/s: "):
        cm.load_state(path)


def test_a_part_that_is_neither_a_tensor_nor_a_state(tmp_path):
    parts = {"numerator": 7, "denominator": None, "position": "tensor"}
    shape = {"kind": "cumulant.ops.state:LinearState", "parts": parts}
    safetensors.torch.save_file(
        {"numerator": torch.zeros(1), "position": torch.zeros(1)},
        tmp_path / "s",
        {"cumulant.state": json.dumps(shape)},
    )
    with pytest.raises(ValueError, match="the file is damaged"):
        cm.load_state(tmp_path / "s")


@pytest.mark.skipif(sys.platform == "win32", reason="no limits on the size of files there")
def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path):
    """A limit on the size of files takes the part of a full disk."""
    path = tmp_path / "s"
    cm.save_state(path, a_state())
    before = path.read_bytes()
    script = f"""
import resource, signal, torch, cumulant as cm
state = cm.load_state({str(path)!r}).select(torch.zeros(10_000, dtype=torch.int64))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, {resource.RLIM_INFINITY}))
try:
    cm.save_state({str(path)!r}, state)
except OSError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert "the state could not be written" in done.stdout
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["s"]
