"""Mamba-2's core is a recurrence, token by token, in float64; states go to and from its layout."""

import re

import pytest
import torch

import cumulant as cm
from cumulant.interop import from_ssm_state, ssd, to_ssm_state

NAMES = ("x", "dt", "A", "B", "C", "D")


def recurrence(x, dt, A, B, C, D=None, h=None):
    """h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_tᵀ, y_t = h_t C_t + D x_t; and the last h."""
    batch, length, heads, channels = x.shape
    h = x.new_zeros(batch, heads, channels, B.shape[3]) if h is None else h
    outputs = []
    for t in range(length):
        rows = []
        for head in range(heads):
            group = head * B.shape[2] // heads
            b, step = B[:, t, group], dt[:, t, head, None, None]
            now = (step * A[head]).exp() * h[:, head]
            rows.append(now + step * x[:, t, head, :, None] * b[:, None])
        h = torch.stack(rows, 1)
        read = [
            (h[:, head] * C[:, t, head * B.shape[2] // heads][:, None]).sum(-1)
            for head in range(heads)
        ]
        y = torch.stack(read, 1)
        if D is not None:
            y = y + (D[:, None] if D.dim() == 1 else D) * x[:, t]
        outputs.append(y)
    return torch.stack(outputs, 1), h


def inputs(length=70, heads=4, groups=2, skip="head", dtype=torch.float64):
    torch.manual_seed(0)
    shapes = {
        "x": (2, length, heads, 3),
        "dt": (2, length, heads),
        "A": (heads,),
        "B": (2, length, groups, 5),
        "C": (2, length, groups, 5),
        "D": {"head": (heads,), "channel": (heads, 3), "none": None}[skip],
    }
    drawn = {n: None if s is None else torch.randn(s, dtype=dtype) for n, s in shapes.items()}
    drawn["dt"], drawn["A"] = torch.nn.functional.softplus(drawn["dt"] - 2), -drawn["A"].exp()
    return {n: None if y is None else y.requires_grad_() for n, y in drawn.items()}


def gradients(y, tensors):
    used = [x for x in tensors.values() if x is not None]
    return torch.autograd.grad((y * y.detach().cos()).sum(), used)


def close(actual, expected, tolerance=1e-10):
    for a, b in zip(actual, expected, strict=True):
        assert torch.allclose(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("impl", ["auto", "torch", "reference"])
@pytest.mark.parametrize(("groups", "skip"), [(1, "none"), (2, "head"), (4, "channel")], ids=str)
def test_it_is_the_recurrence(groups, skip, impl):
    """Outputs, the last state, and the gradients of all six arguments."""
    given = inputs(groups=groups, skip=skip)
    expected, last = recurrence(**given)
    y, state = ssd(**given, return_state=True, impl=impl)
    close((y, to_ssm_state(state)), (expected, last))
    close(gradients(y, given), gradients(expected, given), 1e-9)
    assert state.position.tolist() == [70, 70]


@pytest.mark.parametrize("cuts", [[1] * 70, [7, 1, 62], [64, 6], [0, 70]], ids=lambda c: str(c[:3]))
def test_any_split_is_the_whole(cuts):
    """The package's state is read and written between the pieces, with its gradients."""
    given, state, outs = inputs(), None, []
    pieces = {name: given[name].split(cuts, 1) for name in ("x", "dt", "B", "C")}
    for i in range(len(cuts)):
        parts = {name: split[i] for name, split in pieces.items()}
        y, state = ssd(**parts, A=given["A"], D=given["D"], state=state, return_state=True)
        state = from_ssm_state(to_ssm_state(state), state.position)
        outs.append(y)
    y = torch.cat(outs, 1)
    expected, last = recurrence(**given)
    close((y, to_ssm_state(state)), (expected, last))
    close(gradients(y, given), gradients(expected, given), 1e-9)


def test_a_state_of_the_package_is_continued():
    given, start = inputs(), torch.randn(2, 4, 3, 5, dtype=torch.float64, requires_grad=True)
    expected, last = recurrence(**given, h=start)
    y, state = ssd(**given, state=from_ssm_state(start), return_state=True)
    close((y, to_ssm_state(state)), (expected, last))
    given["start"] = start
    close(gradients(y, given), gradients(expected, given), 1e-9)


def test_packed_is_separate():
    """One sequence is empty; NaN after the last sequence reaches neither outputs nor gradients."""
    bounds = [0, 9, 9, 41, 60]
    given = inputs()
    row = {n: given[n][:1].detach().clone() for n in ("x", "dt", "B", "C")}
    for tensor in row.values():
        tensor[:, 60:] = float("nan")
        tensor.requires_grad_()
    row |= {"A": given["A"], "D": given["D"]}
    start = torch.randn(4, 4, 3, 5, dtype=torch.float64)
    packed = torch.tensor(bounds)
    y, state = ssd(**row, cu_seqlens=packed, state=from_ssm_state(start), return_state=True)
    assert not y[:, 60:].any()
    found, total = gradients(y, row), 0
    for i, (a, b) in enumerate(zip(bounds, bounds[1:])):
        alone = {n: x[:, a:b] if x.dim() > 2 else x for n, x in row.items()}
        if a == b:
            close([to_ssm_state(state)[i]], [start[i]])
            continue
        expected, last = recurrence(**alone, h=start[i : i + 1])
        close((y[:, a:b], to_ssm_state(state)[i]), (expected, last[0]))
        total = total + torch.autograd.grad((expected * expected.detach().cos()).sum(), row["A"])[0]
    assert all(torch.isfinite(g).all() for g in found)
    close([found[list(row).index("A")]], [total], 1e-9)


def test_masked_tokens_do_not_exist():
    given, mask = inputs(), torch.rand(2, 70) > 0.3
    row = {n: given[n].detach().clone() for n in ("x", "dt", "B")}
    for tensor in row.values():
        tensor[~mask] = float("nan")
        tensor.requires_grad_()
    row |= {n: given[n] for n in ("C", "A", "D")}
    y, state = ssd(**row, key_mask=mask, return_state=True)
    assert all(torch.isfinite(g).all() for g in gradients(y, row))
    for b in range(2):
        alone = {n: x[b : b + 1, mask[b]] if x.dim() > 2 else x for n, x in row.items()}
        expected, last = recurrence(**alone)
        close((y[b][mask[b]], to_ssm_state(state)[b]), (expected[0], last[0]))
    assert state.position.tolist() == mask.sum(1).tolist()


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 0.01), (torch.float16, 0.002)]
)
def test_precision(dtype, bound):
    """Sums are in fp32 for low precision, so errors are those of the inputs and of the output."""
    given = {n: x.detach() for n, x in inputs(length=300).items()}
    lowered = {n: x.to(dtype) for n, x in given.items()}
    expected, last = recurrence(**{n: x.double() for n, x in lowered.items()})
    y, state = ssd(**lowered, return_state=True)
    assert y.dtype == dtype
    assert state.numerator.dtype == torch.float32
    assert float((y.double() - expected).norm() / expected.norm()) < bound
    assert float((to_ssm_state(state).double() - last).norm() / last.norm()) < bound


def test_states_are_copies():
    start = torch.randn(2, 4, 3, 5, dtype=torch.bfloat16)
    state = from_ssm_state(start, torch.tensor([3, 4]))
    assert state.numerator.dtype == torch.float32
    assert state.numerator.shape == (2, 4, 5, 3)
    assert state.position.tolist() == [3, 4]
    back = to_ssm_state(state)
    assert torch.equal(back, start.float())
    back.zero_()
    assert state.numerator.any()


WRONG = {
    "x": (lambda x: x[0], "x: expected floats [batch, T, H, P], got [70, 4, 3] torch.float64"),
    "dt": (lambda x: x[:, 1:], "dt: expected [batch, T, H] = [2, 70, 4], got [2, 69, 4]"),
    "A": (lambda x: x[:, None], "A: expected [H] = [4], got [4, 1] torch.float64"),
    "B": (
        lambda x: x[:, :, [0, 0, 0]],
        "B: expected [batch, T, G, N] = [2, 70, G, N] in torch.float64 as x, where G divides the 4"
        " heads, got [2, 70, 3, 5] torch.float64",
    ),
    "C": (lambda x: x[:, :, :1], "C: expected [2, 70, 2, 5] as B, got [2, 70, 1, 5]"),
    "D": (lambda x: x[:3], "D: expected [H] or [H, P] = [4] or [4, 3], got [3] torch.float64"),
}


@pytest.mark.parametrize("name", NAMES)
def test_errors(name):
    given = inputs()
    change, message = WRONG[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        ssd(**given | {name: change(given[name])})


def test_more_errors():
    given = inputs()
    with pytest.raises(ValueError, match="B: expected .* got int"):
        ssd(**given | {"B": 3})
    with pytest.raises(ValueError, match="C: expected .* in torch.float64 as x"):
        ssd(**given | {"C": given["C"].float()})
    with pytest.raises(ValueError, match=r"B: expected .* got \[2, 70, 0, 5\]"):
        ssd(**given | {"B": given["B"][:, :, :0]})
    with pytest.raises(ValueError, match="dt, A: expected products dt A, at most 0, got .*A_log"):
        ssd(**given | {"A": -given["A"]})
    with pytest.raises(ValueError, match="dt, A: expected products dt A, at most 0, got NaN"):
        ssd(**given | {"dt": given["dt"] * float("nan")})
    with pytest.raises(ValueError, match=r"ssm_state: expected floats \[batch, H, P, N\], got \[3"):
        from_ssm_state(torch.zeros(3))
    with pytest.raises(TypeError, match="state: expected a LinearState, got tuple"):
        to_ssm_state((1, 2))
    start = from_ssm_state(torch.zeros(2, 4, 5, 3))
    with pytest.raises(ValueError, match="state"):
        ssd(**given, state=start)
    assert isinstance(start, cm.LinearState)
