"""Memory layouts of chunks: slices of a batch, or gathers from packed sequences.

Both layouts load chunks with the batch in front, ``[n, G, ...]``, where ``n`` counts the sequences
that reach the chunk. Packed sequences are walked longest first, so those still alive are always the
first ``n``. The work is proportional to the tokens; nothing is padded to the longest sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..spec import new_heads


@dataclass(frozen=True)
class Chunk:
    start: int  # first token (dense) or chunk offset inside each sequence (packed)
    length: int
    rows: int  # sequences that reach the chunk
    index: Tensor | None = None  # [n, C] token indices (packed), T where there is no token
    valid: Tensor | None = None  # [n, C] False where there is no token


class Dense:
    """A batch ``[B, H, T, D]``, read by slices."""

    def __init__(self, batch: int, length: int, chunk: int):
        self.batch = batch
        self.order = self.inverse = None
        starts = range(0, length, chunk)
        self.chunks = [Chunk(start, min(chunk, length - start), batch) for start in starts]

    def load_tokens(self, x: Tensor, c: Chunk, groups: int, dtype: torch.dtype) -> Tensor:
        """The chunk's tokens of ``[B, H, T, D]``, as ``[n, G, R * C, D]`` with R = H / G."""
        x = x[:, :, c.start : c.start + c.length].to(dtype)
        return x.reshape(c.rows, groups, x.shape[1] // groups * c.length, x.shape[-1])

    def store_tokens(self, out: Tensor, c: Chunk, y: Tensor, accumulate: bool = False) -> None:
        view = out[:, :, c.start : c.start + c.length]
        y = y.reshape(view.shape)
        view.add_(y) if accumulate else view.copy_(y)

    def load_mask(self, key_mask: Tensor | None, c: Chunk) -> Tensor | None:
        return None if key_mask is None else key_mask[:, c.start : c.start + c.length]

    def new_buffer(
        self, heads: int, length: int, dim: int, like: Tensor, dtype: torch.dtype
    ) -> Tensor:
        return new_heads(like, heads, dim, dtype, length)

    def finish_buffer(self, out: Tensor) -> Tensor:
        return out


class Packed:
    """Sequences packed in ``[1, H, size, D]``, read by gathers.

    `order` lists the index of every token, one sequence after another. By default the tokens lie in
    that order from index 0 on. Tokens of no sequence get zeros in results. An index of `size` or
    above marks a slot without a token.
    """

    def __init__(
        self,
        lengths: Tensor,
        size: int,
        chunk: int,
        device: torch.device,
        order: Tensor | None = None,
    ):
        self.batch, self.size = len(lengths), size
        firsts = lengths.cumsum(0) - lengths
        by_length = torch.argsort(lengths, descending=True, stable=True)
        self.order, self.inverse = by_length.to(device), torch.argsort(by_length).to(device)
        self.lengths, firsts = lengths[by_length], firsts[by_length]
        offset = torch.arange(chunk)
        self.chunks = []
        longest = int(self.lengths[0]) if self.batch else 0
        for start in range(0, longest, chunk):
            rows = int((self.lengths > start).sum())
            length = min(chunk, longest - start)
            valid = start + offset[:length] < self.lengths[:rows, None]
            index = firsts[:rows, None] + start + offset[:length]
            if order is not None:
                index = order[index.clamp(max=len(order) - 1)]
                valid &= index < size
            index = index.where(valid, torch.tensor(size))
            self.chunks.append(Chunk(start, length, rows, index.to(device), valid.to(device)))

    @classmethod
    def from_offsets(cls, cu_seqlens: Tensor, size: int, chunk: int) -> Packed:
        """The layout of sequences that lie end to end from the first token on."""
        return cls(cu_seqlens.cpu().long().diff(), size, chunk, cu_seqlens.device)

    def load_tokens(self, x: Tensor, c: Chunk, groups: int, dtype: torch.dtype) -> Tensor:
        assert c.index is not None
        assert c.valid is not None
        if x.shape[2] == 0:  # the tokens are all of an open group, which has no more queries
            return x.new_zeros(
                c.rows, groups, x.shape[1] // groups * c.length, x.shape[-1], dtype=dtype
            )
        found = x[0].index_select(1, c.index.clamp(max=x.shape[2] - 1).flatten())
        tokens: Tensor = found.to(dtype).unflatten(1, c.index.shape).transpose(0, 1)  # [n, H, C, D]
        tokens = tokens.masked_fill(~c.valid[:, None, :, None], 0)
        return tokens.reshape(c.rows, groups, x.shape[1] // groups * c.length, x.shape[-1])

    def store_tokens(self, out: Tensor, c: Chunk, y: Tensor, accumulate: bool = False) -> None:
        assert c.index is not None
        heads = out.shape[1]
        y = y.reshape(c.rows, heads, c.length, out.shape[-1]).transpose(0, 1)
        y = y.reshape(heads, c.rows * c.length, out.shape[-1])
        index = c.index.flatten()
        if accumulate:
            y = y + out[0].index_select(1, index)
        out[0].index_copy_(1, index, y.to(out.dtype))

    def load_mask(self, key_mask: Tensor | None, c: Chunk) -> Tensor | None:
        if key_mask is None:
            return c.valid
        assert c.index is not None
        assert c.valid is not None
        return key_mask[0][c.index.clamp(max=key_mask.shape[1] - 1)] & c.valid

    def new_buffer(
        self, heads: int, length: int, dim: int, like: Tensor, dtype: torch.dtype
    ) -> Tensor:
        # slots without a token are written to one more row, which `finish_buffer` drops
        return like.new_zeros(1, length + 1, heads, dim, dtype=dtype).transpose(1, 2)

    def finish_buffer(self, out: Tensor) -> Tensor:
        tokens = out[:, :, :-1]
        return new_heads(tokens, *tokens.shape[1::2]).copy_(
            tokens
        )  # a view could not be changed in place


def sort_rows(x: Tensor | None, layout: Dense | Packed) -> Tensor | None:
    """A state's tensor ``[N, ...]``, copied in the layout's order of sequences."""
    if x is None:
        return None
    x = x if layout.order is None else x.index_select(0, layout.order)
    return x.clone(memory_format=torch.contiguous_format)


def unsort_rows(x: Tensor, layout: Dense | Packed) -> Tensor:
    """The inverse of `sort_rows`."""
    return x if layout.inverse is None else x.index_select(0, layout.inverse)
