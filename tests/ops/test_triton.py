"""Triton's kernels of linear and Taylor attention, in Triton's interpreter.

The matrix has the law. Here are what the interpreter hides, and sizes that the matrix lacks. The
other operations are in test_triton_others.py.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import elu

import cumulant as cm
from cumulant.kernels.spec import AttentionInputs, AttentionSpec
from cumulant.kernels.triton import attention

from .cases import TOLERANCE, error
from .interpreter import HAS_TRITON, run_in_any_order
from .native_calls import run_script
from .walking import walk

pytestmark = [
    pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed"),
    pytest.mark.usefixtures("short_chunks"),
]


def attend(
    order: int,
    impl: str,
    dtype: torch.dtype = torch.float64,
    *,
    sizes: tuple[int, ...] = (1, 2, 1, 37, 5, 3),
    is_causal: bool = True,
    decays: bool = False,
    packed: bool = False,
    options: dict[str, Any] | None = None,
) -> list[Tensor]:
    """Output, state, and the gradients of everything, from the same numbers for every `impl`."""
    B, H, G, T, K, V = sizes
    draw = torch.Generator().manual_seed(0)

    def random_numbers(*shape: int) -> Tensor:
        return torch.rand(shape, generator=draw, dtype=torch.float64)

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    q, k, v = (
        (2 * random_numbers(B, heads, T, D) - 1).to(torch.bfloat16).to(dtype)
        for heads, D in ((H, K), (G, K), (G, V))
    )
    F = cm.feature_count(K, order) if order else K
    bounds = torch.tensor([0, 9, 9, T - 3]) if packed else None
    N = 3 if packed else B
    S, z = random_numbers(N, G, F, V).to(wide), 1 + random_numbers(N, G, F).to(wide)
    leaves = [x.requires_grad_() for x in (q, k, v, S, z)]
    call = dict(options or {}, is_causal=is_causal, return_state=True, impl=impl)
    if packed:
        call["cu_seqlens"] = bounds
    if decays:
        leaves.append(-random_numbers(B, G, T).square().to(wide).requires_grad_())
        call["log_decay"] = leaves[-1]
    call["state"] = cm.LinearState(S, z, torch.full((N,), 3))
    if order:
        out, state = cm.taylor_attention(q, k, v, order, **call)
    else:
        out, state = cm.linear_attention(q, k, v, **call)
    found = [out, state.numerator, state.denominator]
    loss = sum((x.double() * random_numbers(*x.shape)).sum() for x in found)
    return [x.detach() for x in (*found, *torch.autograd.grad(loss, leaves))]


def assert_equal_reference(factor: float = 1000, **call: Any) -> None:
    order = call.pop("order")
    for actual, exact in zip(attend(order, "triton", **call), attend(order, "reference", **call)):
        assert error(actual, exact) <= TOLERANCE[torch.float64] * factor


@pytest.mark.parametrize(
    ("order", "sizes"),
    [
        (0, (1, 1, 1, 20, 70, 3)),  # two parts of a vector
        (0, (1, 2, 1, 18, 5, 70)),  # two blocks of values
        (2, (1, 2, 1, 18, 3, 70)),
        (2, (1, 1, 1, 18, 1, 1)),
        (2, (1, 1, 1, 18, 2, 3)),
        (2, (1, 1, 1, 17, 12, 3)),  # several tiles of features
        (2, (1, 1, 1, 17, 16, 3)),  # whose number K divides
        (2, (1, 1, 1, 17, 8, 3)),
        (1, (2, 1, 1, 20, 17, 3)),
    ],
)
@pytest.mark.parametrize("form", ["causal", "decay", "both"])
def test_sizes(order: int, sizes: tuple[int, ...], form: str):
    assert_equal_reference(
        order=order, sizes=sizes, is_causal=form != "both", decays=form == "decay"
    )


@pytest.mark.parametrize("order", [0, 2])
@pytest.mark.parametrize("processors", [1, 1000], ids=["whole", "split"])
def test_nothing_unwritten_is_read(order: int, processors: int, monkeypatch, unwritten_is_nan):
    walk(monkeypatch, triton_processors=processors)
    assert_equal_reference(order=order, decays=True)
    assert_equal_reference(order=order, decays=True, packed=True)
    assert_equal_reference(order=order, is_causal=False)


@pytest.mark.parametrize("order", [0, 2])
def test_programs_of_a_launch_do_not_depend_on_each_other(order: int, monkeypatch):
    """The interpreter runs them one after another; here in three other orders."""

    def run(seed: int | None) -> list[Tensor]:
        run_in_any_order(monkeypatch, seed)
        return [
            *attend(order, "triton", decays=True),
            *attend(order, "triton", packed=True),
            *attend(order, "triton", is_causal=False),
        ]

    usual = run(None)
    for seed in (1, 2, 3):
        assert all(torch.equal(a, b) for a, b in zip(run(seed), usual, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("order", [0, 1, 2])
def test_exactness(order: int, dtype: torch.dtype):
    """Denominators are as exact in half precision as in fp32."""
    call = {"sizes": (1, 1, 1, 70, 16, 16), "decays": order == 2}
    found = attend(order, "triton", dtype, **call)
    exact = attend(order, "reference", **call)
    assert error(found[0], exact[0]) <= TOLERANCE[dtype]
    assert error(found[2], exact[2]) <= 1e-5  # the state's denominator
    q, k, v = (torch.randn(1, 1, 70, 16).to(dtype) for _ in range(3))
    assert error(*denominators(order, q, k, v)) <= 1e-5


def denominators(order: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """What the kernels divide outputs by, and the same in fp64."""
    activation, scale = ("identity", 0.25) if order else ("elu", 1.0)
    spec = AttentionSpec(order, True, activation, scale, True, True, False)
    inputs = AttentionInputs(q, k, v)
    found = attention.forward(inputs, attention.prepared(inputs, spec)).denominators
    q, k = q.double(), k.double()
    if order:
        x = scale * q @ k.mT
        return found, (1 + x + (x * x / 2 if order == 2 else 0)).tril().sum(-1)
    # queries without positive numbers are multiplied, which the quotient does not see
    q = q - q.amax(-1, keepdim=True).clamp(max=0)
    return found, ((elu(q) + 1) @ (elu(k) + 1).mT).tril().sum(-1)


@pytest.mark.parametrize("order", [0, 2])
@pytest.mark.parametrize("T", [1, 20])
def test_any_memory_layout(order: int, T: int):
    """Inputs with any strides, expanded ones too, states that are transposed, and gradients too."""

    def lay_out(x: Tensor) -> Tensor:
        return x.detach().mT.contiguous().mT

    results = []
    for change in (lambda x: x, lay_out):
        torch.manual_seed(0)
        q, v = torch.randn(1, 2, T, 4).double(), torch.randn(1, 1, T, 3).double()
        k = torch.randn(1, 1, 1, 4).double().expand(1, 1, T, 4)
        F = cm.feature_count(4, order) if order else 4
        S, z = torch.rand(1, 1, F, 3).double(), torch.rand(1, 1, F).double().expand(1, 1, F) + 1
        leaves = [change(x).requires_grad_() for x in (q, k, v, S)]
        z = z.repeat_interleave(2, -1)[..., ::2] if change is lay_out else z
        state = cm.LinearState(leaves[-1], z, torch.tensor([2]))
        logs = lay_out(-torch.rand(1, 1, T).double())
        options = {"state": state, "log_decay": logs, "return_state": True, "is_causal": True}
        if order:
            out, end = cm.taylor_attention(*leaves[:3], order, impl="triton", **options)
        else:
            out, end = cm.linear_attention(*leaves[:3], impl="triton", **options)
        loss = out.sum() + end.numerator.mT.sum()  # their gradients are expanded
        results.append([out, end.numerator, *torch.autograd.grad(loss, leaves)])
    for actual, expected in zip(*results):
        assert torch.equal(actual, expected)


def test_numbers_beyond_32_bits():
    """Rows of the inputs 2^27 elements apart; only the pages in use take memory."""
    T, K = 18, 4  # the last row begins beyond 2^31
    memory = torch.empty(2**27 * T, dtype=torch.bfloat16)
    far = memory.as_strided((1, 1, T, K), (0, 0, 2**27, 1))
    near = torch.randn(1, 1, T, K).bfloat16()
    far.copy_(near)
    for op in (cm.linear_attention, cm.taylor_attention):
        expected = op(near, near, near, is_causal=True, impl="triton")
        assert torch.equal(op(far, far, far, is_causal=True, impl="triton"), expected)


GUARDED = """
import ctypes, mmap, torch
import cumulant as cm
from cumulant.kernels.triton import attention, device, elita, mixed_chunk

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
PAGE = mmap.PAGESIZE

def guarded(shape, dtype, at_end):
    size = torch.Size(shape).numel() * dtype.itemsize
    length = -(-max(size, 1) // PAGE) * PAGE
    base = libc.mmap(None, length + 2 * PAGE, 3, 0x22, -1, 0)
    libc.mprotect(base, PAGE, 0)
    libc.mprotect(base + PAGE + length, PAGE, 0)
    start = base + PAGE + (length - size if at_end else 0)
    if not size:
        return torch.zeros(shape, dtype=dtype)
    buffer = (ctypes.c_char * size).from_address(start)
    return torch.frombuffer(buffer, dtype=dtype).view(shape)

attention.CHUNK = elita.CHUNK = mixed_chunk.CHUNK = attention.SPAN = elita.SPAN = 16
device.PROCESSORS = 1000
for at_end in (True, False):
    def new_empty(self, *shape, dtype=None, device=None):
        shape = shape[0] if isinstance(shape[0], (tuple, torch.Size)) else shape
        return guarded(shape, dtype or self.dtype, at_end)
    def new_empty_strided(self, shape, strides, dtype=None):
        flat = guarded((torch.Size(shape).numel(),), dtype or self.dtype, at_end)
        return flat.as_strided(shape, strides)
    torch.Tensor.new_empty, torch.Tensor.new_empty_strided = new_empty, new_empty_strided
    torch.empty = lambda shape, dtype, device: guarded(shape, dtype, at_end)
    def take(*shape):
        return guarded(shape, torch.float32, at_end).copy_(torch.rand(shape)).requires_grad_()
    for order, T in ((0, 21), (2, 21), (2, 1)):
        F = cm.feature_count(3, order) if order else 3
        q, k, v = take(1, 2, T, 3), take(1, 1, T, 3), take(1, 1, T, 5)
        state = cm.LinearState(take(1, 1, F, 5), take(1, 1, F), torch.tensor([0]))
        logs = (-take(1, 1, T)).detach()
        mask = guarded((1, T), torch.bool, at_end).fill_(True)
        options = {"state": state, "log_decay": logs, "key_mask": mask, "is_causal": True}
        options |= {"return_state": True, "impl": "triton"}
        if order:
            out, end = cm.taylor_attention(q, k, v, order, **options)
        else:
            out, end = cm.linear_attention(q, k, v, **options)
        (out.sum() + end.numerator.sum() + end.denominator.sum()).backward()
    for T in (37, 1):
        state = cm.ElitaState(take(1, 1).double(), take(1, 1, 5).double(), torch.tensor([3]))
        call = take(1, 1, T), take(1, 2, T), take(1, 2, T), take(1, 1, T, 5)
        out, end = cm.elita_attention(*call, state=state, return_state=True, impl="triton")
        (out.sum() + end.mean.sum() + end.log_weight.sum()).backward()
        with torch.no_grad():
            cm.elita_attention(*call, state=state, return_state=True, impl="triton")
        call = *(take(1, h, T, D) for h, D in ((2, 3), (1, 3), (2, 7), (1, 7))), take(1, 1, T, 5)
        still_open = (take(1, 1, 20, D) for D in (3, 7, 5))
        state = cm.MixedChunkState(take(1, 1, 7, 5), *still_open, torch.tensor([23]))
        out, end = cm.mixed_chunk_attention(
            *call, group_size=20, bias=take(20, 20), is_causal=True, state=state,
            key_mask=guarded((1, T), torch.bool, at_end).fill_(True), return_state=True,
            impl="triton",
        )
        (out.sum() + end.numerator.sum() + end.value.sum()).backward()
print("all inside")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs mmap")
def test_nothing_outside_of_tensors_is_touched():
    """Every tensor ends or begins at a page that may not be read."""
    done = run_script(GUARDED, TRITON_INTERPRET="1")
    assert done.stdout.strip() == "all inside", done.stderr


def test_gpu_tensors_are_needed_without_the_interpreter():
    script = """
import torch, cumulant as cm
x = torch.ones(1, 1, 3, 4)
print(cm.explain(cm.linear_attention, x, x, x).impl)
cm.linear_attention(x, x, x, impl="triton")
"""
    failed = run_script(script, TRITON_INTERPRET="0")
    assert failed.stdout.strip() == "native"
    assert "'triton' cannot run this call: its kernels run on GPUs" in failed.stderr


def test_sizes_without_kernels_are_refused():
    x = torch.ones(1, 1, 3, 40)
    with pytest.raises(ValueError, match="K up to 32 and V up to 256, not K = 40"):
        cm.taylor_attention(x, x, x, impl="triton")
    with pytest.raises(ValueError, match="up to order 2, and this is order 3"):
        cm.taylor_attention(x, x, x, 3, impl="triton")
    assert cm.explain(cm.linear_attention, x, x, x).impl != "triton"
    assert "chunks of 16 tokens, 40 features" in str(
        cm.explain(cm.linear_attention, x, x, x, impl="triton")
    )


def test_chunks_by_generation():
    """Shorter chunks where longer ones spill registers; the table has the figures."""
    assert [attention.chunk_on(g, 0) for g in (0, 8, 9, 10, 12)] == [16, 32, 16, 16, 32]
    assert attention.chunk_on(8, 2) == attention.CHUNK
