"""How often Triton would compile the kernels, counted without a GPU.

A driver that stands for a GPU gives Triton its name. What would be compiled is noted, and nothing
runs.
"""

from __future__ import annotations

import json

import pytest

from .interpreter import HAS_TRITON
from .native_calls import run_script

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")

ATTENTION = {"key_sums", "outputs", "query_sums", "query_gradients", "key_gradients", "scan_spans"}
# Without a state, with one, and from other spans; in both directions; for matrices and vectors
USES = {"scan_spans": 6, "group_sums": 4, "scan_groups": 4, "open_group": 4}
KERNELS = {
    "elita": {"span_means", "scan_means", "mean_outputs", "mean_gradient_sums", "mean_gradients"},
    "mixed": {"group_sums", "scan_groups", "mixed_outputs", "mixed_key_gradients", "open_group"},
}

COUNT = """
import collections, json, torch
import triton
from triton.backends.compiler import GPUTarget
import cumulant as cm
from cumulant.kernels.triton import device

class Driver:
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)
    get_current_device = lambda self: 0
    get_current_stream = lambda self, device: 0

class Nothing:
    function = packed_metadata = None
    launch_metadata = run = lambda *arguments: None

def note(kernel, key, *rest):
    found[kernel.__name__] += 1
    kernel.device_caches[0][0][key] = Nothing()
    return Nothing()

triton.runtime.driver.set_active(Driver())
triton.runtime.jit.JITFunction._do_compile = note
device.obstacle = lambda x: ""
device.PROCESSORS = 132

def attend(T, kind, K, V, state=None):
    q, k, v = (torch.zeros(1, 1, T, D).requires_grad_() for D in (K, K, V))
    logs = torch.zeros(1, 1, T)
    options = {"state": state, "impl": "triton", "return_state": True}
    if kind == "mixed":
        options |= {"is_causal": True, "group_size": 64}
        out, state = cm.mixed_chunk_attention(q, k, q, k, v, **options)
    elif kind == "elita":
        out, state = cm.elita_attention(logs, logs, logs, v, **options)
    elif kind == "taylor":
        options |= {"is_causal": True, "log_decay": logs}
        out, state = cm.taylor_attention(q, k, v, **options)
    else:
        options |= {"is_causal": True, "log_decay": logs}
        out, state = cm.linear_attention(q, k, v, **options)
    out.sum().backward()
    return type(state)(*(x.detach() for x in vars(state).values()))

counts = {}
for kind in ("taylor", "linear", "elita", "mixed"):
    for K, V in ((16, 64), (5, 7)):
        found = collections.Counter()
        state = attend(20, kind, K, V)
        for T in range(1, 3001, 3 if K == 5 else 33):
            attend(T, kind, K, V, state)
        counts[f"{kind} {K} {V}"] = found
print(json.dumps(counts))
"""


def test_lengths_are_no_constants():
    """Over 1,000 lengths a kernel is compiled once for each way in which it is used.

    It is compiled twice where vectors have an odd length: rows of a batch then begin at multiples
    of 16 numbers in some calls.
    """
    done = run_script(COUNT, TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stderr
    for call, found in json.loads(done.stdout).items():
        assert KERNELS.get(call.split()[0], ATTENTION) <= set(found)
        for kernel, compiled in found.items():
            uses = USES.get(kernel, 3)
            assert compiled <= uses * (1 if call.endswith("16 64") else 2), (call, kernel)
