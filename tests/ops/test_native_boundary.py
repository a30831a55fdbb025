"""The C boundary: both sides agree on every struct, and Python refuses bad input before it."""

from __future__ import annotations

import ctypes

import pytest
import torch

from cumulant.kernels.native import library
from cumulant.kernels.operators.attention import call_attention
from cumulant.kernels.operators.elita import call_elita
from cumulant.kernels.spec import AttentionInputs, AttentionSpec, ElitaInputs, ElitaSpec

from .cases import inputs

structures = pytest.mark.parametrize("structure", library.STRUCTURES, ids=lambda s: s.__name__)


def described() -> dict[str, str]:
    """The fields of each struct, as the compiled kernels report them."""
    lines = library._compiled_layout(library.loaded_library()).splitlines()
    return {line.split()[0]: line for line in lines}


@structures
def test_every_field_lies_where_the_kernels_read_it(structure):
    name, *fields, size = described()[structure.__name__].split()
    assert name == structure.__name__
    assert dict(field.split(":") for field in fields) == {
        field: str(getattr(structure, field).offset) for field, *_ in structure._fields_
    }
    assert size == f"size:{ctypes.sizeof(structure)}"


@structures
def test_fields_that_change_places_are_noticed(structure, monkeypatch):
    """If any two neighbours are swapped, nothing is loaded; most have the same size."""
    for i in range(len(structure._fields_) - 1):
        swapped = list(structure._fields_)
        swapped[i : i + 2] = reversed(swapped[i : i + 2])
        other = type(structure.__name__, (ctypes.Structure,), {"_fields_": swapped})
        found = tuple(other if s is structure else s for s in library.STRUCTURES)
        monkeypatch.setattr(library, "STRUCTURES", found)
        loaded, reason = library._load_library.__wrapped__()
        assert loaded is None
        assert "compiled from another version" in reason


def test_no_struct_is_left_out():
    kinds = {
        kind
        for kind in vars(library).values()
        if isinstance(kind, type) and issubclass(kind, ctypes.Structure)
    }
    assert kinds - {ctypes.Structure} == set(library.STRUCTURES)
    assert list(described()) == [structure.__name__ for structure in library.STRUCTURES]


def arguments(**changes):
    q, k, v = inputs(2, 4, 10, 3, 5, dtype=torch.float32)
    given = {
        "query": q,
        "key": k,
        "value": v,
        "key_mask": None,
        "cu_seqlens": None,
        "numerator": None,
    }
    given |= {
        "denominator": None,
        "returns_state": True,
        "order": 2,
        "constant_term": True,
        "activation": "identity",
    }
    given |= {
        "scale": 1.0,
        "normalize": True,
        "is_causal": True,
        "chunk": 64,
        "span": 512,
    } | changes
    spec = AttentionSpec(**{name: given.pop(name) for name in AttentionSpec._fields})
    return "native", AttentionInputs(**given), spec


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"key": torch.zeros(2, 2, 10, 4)}, r"key: expected \[2, 2, 10, 3\], got \[2, 2, 10, 4\]"),
        (
            {"value": torch.zeros(2, 2, 9, 5)},
            r"value: expected \[2, 2, 10, 5\], got \[2, 2, 9, 5\]",
        ),
        (
            {"value": torch.zeros(2, 2, 10, 5).long()},
            r"value: expected fp16, bf16, fp32 or fp64, got torch.int64",
        ),
        (
            {"key": torch.zeros(2, 3, 10, 3), "value": torch.zeros(2, 3, 10, 5)},
            "key: expected heads that divide",
        ),
        (
            {"key": torch.zeros(2, 2, 7, 3), "value": torch.zeros(2, 2, 7, 5)},
            "key: expected 10 tokens, as many",
        ),
        (
            {"key_mask": torch.ones(2, 9, dtype=torch.bool)},
            r"key_mask: expected \[2, 10\], got \[2, 9\]",
        ),
        (
            {"cu_seqlens": torch.tensor([0, 10])},
            "cu_seqlens: expected offsets that rise from 0 .* and B = 1",
        ),
        ({"order": 9}, "order: expected at most 8, got 9"),
        ({"order": -1}, "order: expected at most 8, got -1"),
        ({"activation": "gelu"}, "activation: expected one of"),
        ({"chunk": 65}, "chunk: expected 1 to 64, got 65"),
        ({"chunk": 0}, "chunk: expected 1 to 64, got 0"),
        ({"span": 0}, "span: expected at least 1, got 0"),
        (
            {"numerator": torch.zeros(2, 2, 9, 5)},
            r"numerator: expected \[2, 2, 10, 5\], got \[2, 2, 9, 5\]",
        ),
        (
            {"numerator": torch.zeros(2, 2, 10, 5)},
            "denominator: expected with the numerator, got None",
        ),
        (
            {"denominator": torch.zeros(2, 2, 9)},
            r"denominator: expected \[2, 2, 10\], got \[2, 2, 9\]",
        ),
    ],
)
def test_what_does_not_fit_never_reaches_the_kernels(changes, message):
    with pytest.raises(ValueError, match=message):
        call_attention(*arguments(**changes))


@pytest.mark.parametrize("bounds", [[0, 5, 3, 10], [1, 10], [0, 11], [-1, 10]])
def test_packed_offsets_that_do_not_fit_never_reach_the_kernels(bounds):
    x = {name: getattr(arguments()[1], name)[:1] for name in ("query", "key", "value")}
    with pytest.raises(
        ValueError, match="cu_seqlens: expected offsets that rise from 0 to at most 10"
    ):
        call_attention(*arguments(**x, cu_seqlens=torch.tensor(bounds)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"key_logit": torch.zeros(2, 2, 9)}, r"key_logit: expected \[2, 2, 10\], got \[2, 2, 9\]"),
        (
            {"self_logit": torch.zeros(2, 3, 10)},
            r"self_logit: expected \[2, 4, 10\], got \[2, 3, 10\]",
        ),
        ({"first": torch.zeros(9, dtype=torch.bool)}, r"first: expected \[10\], got \[9\]"),
        ({"mean": torch.zeros(2, 2, 5)}, "mean: expected a log-sum and a mean, or neither"),
        (
            {"log_weight": torch.zeros(2, 2), "mean": torch.zeros(2, 2, 4)},
            r"mean: expected \[2, 2, 5\]",
        ),
        ({"span": 0}, "span: expected at least 1"),
    ],
)
def test_elita_that_does_not_fit_never_reaches_the_kernels(changes, message):
    given = {"key_logit": torch.zeros(2, 2, 10), "query_logit": torch.zeros(2, 4, 10)}
    given |= {"self_logit": torch.zeros(2, 4, 10), "value": torch.zeros(2, 2, 10, 5)}
    given |= {"span": 512} | changes
    spec = ElitaSpec(span=given.pop("span"), block=16)
    with pytest.raises(ValueError, match=message):
        call_elita("native", ElitaInputs(**given), spec)
