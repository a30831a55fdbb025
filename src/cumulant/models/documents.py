"""Documents packed into rows.

Clients mark them by positions that start again, by a number for each document, or by offsets. They
are then joined in one row without padding, in which no document sees another.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops.checks import check_cu_seqlens
from .inputs import require


class Marks(NamedTuple):
    """The marks of documents in one call; None for each that was not passed.

    position_ids and seq_idx are ``[B, T]``. The other tensors are offsets ``[N + 1]`` in one row.
    """

    position_ids: Tensor | None = None
    seq_idx: Tensor | None = None
    cu_seqlens: Tensor | None = None
    cu_seq_lens_q: Tensor | None = None
    cu_seq_lens_k: Tensor | None = None
    max_length: int | None = None

    @classmethod
    def read(cls, arguments: Mapping[str, Any], **named: Tensor | None) -> Marks:
        """The `named` marks, and those among a call's other arguments."""
        lengths = [
            int(arguments[name])
            for name in ("max_length_q", "max_length_k")
            if arguments.get(name) is not None
        ]
        offsets = {name: arguments.get(name) for name in ("cu_seq_lens_q", "cu_seq_lens_k")}
        return cls(**named, **offsets, max_length=min(lengths, default=None))

    @property
    def given(self) -> bool:
        return any(mark is not None for mark in self[:5])


class Documents(NamedTuple):
    """The documents of a batch, joined in one row.

    cu_seqlens: their offsets ``[N + 1]``. origin: ``[M]``, the index of each token in the flattened
    batch; None: the batch is that row already.
    """

    cu_seqlens: Tensor
    origin: Tensor | None

    def flatten(self, x: Tensor) -> Tensor:
        """``[B, T, D]`` -> ``[1, M, D]``."""
        return x if self.origin is None else x.flatten(0, 1)[None, self.origin]

    def restore(self, y: Tensor, rows: int, length: int) -> Tensor:
        """``[1, M, D]`` -> ``[B, T, D]``, with zeros for padding."""
        if self.origin is None:
            return y
        flat = y.new_zeros(rows * length, y.shape[2])
        return flat.index_copy(0, self.origin, y[0]).view(rows, length, -1)


def find_documents(
    marks: Marks,
    rows: int,
    length: int,
    key_mask: Tensor | None,
    *,
    absolute: bool,
    past: int,
    past_mask: Tensor | None,
) -> Documents | None:
    """The documents that the marks separate in ``[B, T]`` tokens; None if each row is one document.

    Within a document, positions must rise by one, as the model counts them itself. With `absolute`
    they must also start at 0; otherwise only distances matter.

    Raises:
        ValueError: marks of another shape; positions with gaps; marks that contradict each other or
            the cache.
    """
    cu_seqlens = _given_offsets(marks, rows)
    others = marks.position_ids is not None or marks.seq_idx is not None
    if cu_seqlens is not None and key_mask is None and not others:
        _check_max_length(marks, cu_seqlens)
        return Documents(cu_seqlens, None)
    if not marks.given:
        return None
    if torch.compiler.is_exporting() and marks.position_ids is not None:
        # an exported graph is limited to one document in each row
        positions = _flat_mark("position_ids", marks.position_ids, rows, length).view(rows, length)
        require(
            (positions.diff() > 0).all(),
            "position_ids: the exported model takes rows of one document each",
        )
        return None
    device = next(mark.device for mark in marks[:5] if mark is not None)
    slots = torch.arange(rows * length, device=device)
    index = slots if key_mask is None else slots[key_mask.flatten().to(device)]
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, rows, length, length, device)
        index = index[index < cu_seqlens[-1]]
    new_row = _value_changes(index // length)
    later = _later_starts(marks, cu_seqlens, index, rows, length)
    starts = torch.cat((later.new_ones(min(1, len(index))), later))
    if marks.position_ids is not None:
        positions = _flat_mark("position_ids", marks.position_ids, rows, length)[index]
        counted = past if past_mask is None else past_mask.sum(1)[index // length]
        _check_starts(
            positions, starts, absolute=absolute, past=past, counted=counted, slot=index % length
        )
    if torch.equal(later, new_row):
        return None
    end = starts.new_full((1,), len(index), dtype=torch.long)
    bounds = torch.cat((starts.nonzero()[:, 0], end))
    _check_max_length(marks, bounds)
    whole = rows == 1 and len(index) == length
    return Documents(bounds.to(torch.int32), None if whole else index)


def _later_starts(
    marks: Marks, cu_seqlens: Tensor | None, index: Tensor, rows: int, length: int
) -> Tensor:
    """Whether each token at ``index [M]``, except the first, starts a document: ``[M - 1]`` bool.

    Documents start at new rows and where the marks say so. All marks must agree.
    """
    new_row = _value_changes(index // length)
    starts = {}  # by the name of the mark
    if marks.position_ids is not None:
        positions = _flat_mark("position_ids", marks.position_ids, rows, length)[index]
        starts["position_ids"] = _position_restarts(positions, index, new_row)
    if marks.seq_idx is not None:
        starts["seq_idx"] = _value_changes(
            _flat_mark("seq_idx", marks.seq_idx, rows, length)[index]
        )
    if cu_seqlens is not None:
        starts["cu_seqlens"] = _value_changes(
            torch.searchsorted(cu_seqlens.long(), index, right=True)
        )
    (name, first), *rest = ((name, found | new_row) for name, found in starts.items())
    for other, found in rest:
        if not torch.equal(first, found):
            slot = int(index[(first != found).nonzero()[0, 0] + 1]) % length
            raise ValueError(
                f"{other}: marks other documents than {name}, at token {slot} of a row; pass one"
                " of them"
            )
    return first


def ignore_first_labels(
    labels: Tensor,
    marks: Marks,
    attention_mask: Tensor | None,
    tokens: int,
    items: Tensor | int | None,
) -> tuple[Tensor, Tensor | int | None]:
    """Labels ``[B, T]`` with -100 for the first token of each document, and the number of items.

    Nothing in a document comes before its first token. `items`, the divisor of the loss, is reduced
    in proportion. The model has checked the marks already.
    """
    if not marks.given:
        return labels, items
    rows, length = labels.shape
    if length != tokens:
        raise ValueError(
            f"logits_to_keep: packed documents need the labels of all {tokens} tokens, got {length}"
        )
    key_mask = None if attention_mask is None else attention_mask.bool()
    documents = find_documents(
        marks, rows, length, key_mask, absolute=False, past=0, past_mask=None
    )
    if documents is None:
        return labels, items
    first = documents.cu_seqlens[:-1].long()
    first = first[first < documents.cu_seqlens[-1]]
    if documents.origin is not None:
        first = documents.origin[first]
    kept = labels.flatten().index_fill(0, first, -100).view_as(labels)
    if items is not None:
        # the caller may have counted over several batches, so scale by the share that is left
        counted, left = ((x[:, 1:] != -100).sum() for x in (labels, kept))
        items = items * (left / counted.clamp(min=1))
    return kept, items


def _given_offsets(marks: Marks, rows: int) -> Tensor | None:
    """The offsets under any of their three names, which must agree."""
    found: tuple[str, Tensor] | None = None
    for name in ("cu_seqlens", "cu_seq_lens_q", "cu_seq_lens_k"):
        mark = getattr(marks, name)
        if mark is None:
            continue
        if rows != 1:
            raise ValueError(
                f"{name}: packed documents need one row, B = 1, got B = {rows}; or pass"
                " position_ids"
            )
        if found is not None:
            message = f"{name}: differs from {found[0]}; pass one of them"
            if mark.shape != found[1].shape:
                raise ValueError(message)
            require((mark == found[1]).all(), message)
        found = found or (name, mark)
    return None if found is None else found[1]


def _flat_mark(name: str, mark: Tensor, rows: int, length: int) -> Tensor:
    if mark.is_floating_point() or mark.shape not in ((rows, length), (1, length), (length,)):
        raise ValueError(
            f"{name}: expected integers [B, T] = [{rows}, {length}], got {mark.dtype}"
            f" {list(mark.shape)}"
        )
    return mark.expand(rows, length).flatten()


def _value_changes(values: Tensor) -> Tensor:
    """Where a value differs from the one before: ``[M]`` -> ``[M - 1]``."""
    return values[1:] != values[:-1]


def _position_restarts(positions: Tensor, index: Tensor, new_row: Tensor) -> Tensor:
    """Where positions do not rise: ``[M]`` -> ``[M - 1]``."""
    step = positions[1:] - positions[:-1]
    # positions may or may not count padding between two tokens
    gaps = (step > 1) & (step != index[1:] - index[:-1]) & ~new_row
    if bool(gaps.any()):
        first = int(gaps.nonzero()[0, 0])
        raise ValueError(
            f"position_ids: {int(positions[first])} is followed by {int(positions[first + 1])};"
            " positions rise by one in a document, and a smaller one begins the next"
        )
    return step < 1


def _check_starts(
    positions: Tensor,
    starts: Tensor,
    *,
    absolute: bool,
    past: int,
    counted: int | Tensor,
    slot: Tensor,
) -> None:
    """Documents start at 0, or behind a cache at the next position.

    Positions that count padding start at the token's slot in the row instead.
    """
    if not absolute and past == 0:
        return
    wrong = starts & (positions != counted) & (positions != slot + past)
    if bool(wrong.any()):
        found = int(positions[wrong.nonzero()[0, 0]])
        where = (
            f"behind {past} cached positions it must go on from there"
            if past
            else "this model counts from 0"
        )
        raise ValueError(
            f"position_ids: a document begins at {found}, but {where}; leave position_ids out"
        )


def _check_max_length(marks: Marks, cu_seqlens: Tensor) -> None:
    if marks.max_length is None or torch.compiler.is_compiling():
        return
    longest = int(cu_seqlens.diff().max())
    if marks.max_length < longest:
        raise ValueError(
            f"max_length_q: {marks.max_length} is less than the longest document, {longest} tokens"
        )
