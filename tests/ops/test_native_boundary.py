"""The structs that cross the C boundary: both sides must mean the same fields."""

from __future__ import annotations

import ctypes

import pytest

from cumulant.kernels.native import library

structures = pytest.mark.parametrize("structure", library.STRUCTURES, ids=lambda s: s.__name__)


def described() -> dict[str, str]:
    """What the compiled kernels say of each struct."""
    lines = library._layout(library.loaded()).splitlines()
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
    """Every pair of neighbours, most of which are of one size; and then nothing is loaded."""
    for i in range(len(structure._fields_) - 1):
        swapped = list(structure._fields_)
        swapped[i : i + 2] = reversed(swapped[i : i + 2])
        other = type(structure.__name__, (ctypes.Structure,), {"_fields_": swapped})
        found = tuple(other if s is structure else s for s in library.STRUCTURES)
        monkeypatch.setattr(library, "STRUCTURES", found)
        loaded, reason = library._load.__wrapped__()
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
