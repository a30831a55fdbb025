"""The options and tensors of each operation, as the kernels take them.

An operation has three classes. `...Spec` has its options; `...Inputs` and `...Outputs` name its
tensors, with the shapes in the letters of DESIGN.md. Gradients use the same classes: `...Outputs`
for upstream gradients and `...Inputs` for gradients of inputs, with None for missing ones. The
operators (`operators/`) make their schemas from these classes, so a new argument is added here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


def accumulation_dtype(*tensors: Tensor | torch.dtype) -> torch.dtype:
    """The dtype of sums over these tensors: fp64 if any of them is fp64, else fp32."""
    for x in tensors:  # a generator would take twice as long, several times a call
        if (x if isinstance(x, torch.dtype) else x.dtype) == torch.float64:
            return torch.float64
    return torch.float32


def feature_count(dim: int, order: int, constant_term: bool) -> int:
    """The number of Taylor features: ``C(dim + order, order)``, one fewer without the constant.

    Order 0 stands for the identity, which has `dim` features.
    """
    if order == 0:
        return dim
    size = 1
    for p in range(1, order + 1):  # math.comb does not trace
        size = size * (dim + p) // p
    return size if constant_term else size - 1


def new_heads(
    x: Tensor, heads: int, width: int, dtype: torch.dtype | None = None, length: int | None = None
) -> Tensor:
    """An empty ``[B, heads, T, width]`` for ``x [B, ., T, .]``, with a token's heads side by side.

    Projections read and write this memory layout, so splitting and joining heads copies nothing,
    neither outputs nor gradients. The result is not a view, because autograd refuses to change some
    views in place.

    length: replaces T.
    """
    B, T = x.shape[0], x.shape[2] if length is None else length
    return x.new_empty_strided(
        (B, heads, T, width), (T * heads * width, width, heads * width, 1), dtype=dtype
    )


def copy_heads(x: Tensor) -> Tensor:
    """A copy of ``x [B, heads, T, width]`` in the memory layout of `new_heads`."""
    return new_heads(x, x.shape[1], x.shape[3]).copy_(x)


def sequence_count(batch: int, cu_seqlens: Tensor | None) -> int:
    """N: the rows of the batch, or the sequences packed into its single row."""
    return batch if cu_seqlens is None else cu_seqlens.shape[0] - 1


class AttentionInputs(NamedTuple):
    """Inputs of linear and Taylor attention; numerator and denominator are the state before it."""

    query: Tensor  # [B, H, T, K]
    key: Tensor  # [B, G, S, K]
    value: Tensor  # [B, G, S, V]
    key_mask: Tensor | None = None  # [B, S] bool
    cu_seqlens: Tensor | None = None  # [N + 1]
    numerator: Tensor | None = None  # [N, G, F, V]
    denominator: Tensor | None = None  # [N, G, F]
    log_decay: Tensor | None = None  # [B, G, S], causal only

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of sums."""
        return accumulation_dtype(self.query, self.key, self.value)

    def one_token(self) -> AttentionInputs:
        """A row's first token, without masks, packing and state."""
        q, k, v = (x[:1, :, :1] for x in self[:3])
        logs = None if self.log_decay is None else self.log_decay[:1, :, :1]
        return AttentionInputs(q, k, v, log_decay=logs)


class AttentionOutputs(NamedTuple):
    """Outputs in the dtype of sums. Tensors that the options do not request are empty, ``[0]``."""

    out: Tensor  # [B, H, T, V]
    denominators: Tensor  # [B, H, T], where outputs are normalised
    final_numerator: Tensor  # [N, G, F, V], the state after these keys
    final_denominator: Tensor  # [N, G, F]


class AttentionSpec(NamedTuple):
    """Options of linear and Taylor attention: an activation, then Taylor features up to `order`."""

    order: int  # 0: the features are the activated vectors themselves
    constant_term: bool
    activation: str  # "identity", "elu" or "relu"
    scale: float  # of the query, before its activation
    normalize: bool
    is_causal: bool
    returns_state: bool  # whether the final state is an output, for users or the backward pass
    chunk: int = 0  # tokens in a chunk, which each implementation chooses
    span: int = 0  # the fewest tokens for a thread, where threads share one sequence

    def new_outputs(self, x: AttentionInputs) -> AttentionOutputs:
        """Empty outputs, in the memory layout of every implementation."""
        (B, H, T, K), G, V = x.query.shape, x.key.shape[1], x.value.shape[3]
        N, F = sequence_count(B, x.cu_seqlens), feature_count(K, self.order, self.constant_term)
        normalized, dtype = self.returns_state and self.normalize, x.dtype
        return AttentionOutputs(
            new_heads(x.query, H, V, dtype),
            x.query.new_empty((B, H, T) if self.normalize else (0,), dtype=dtype),
            x.query.new_empty((N, G, F, V) if self.returns_state else (0,), dtype=dtype),
            x.query.new_empty((N, G, F) if normalized else (0,), dtype=dtype),
        )

    def new_gradients(self, x: AttentionInputs, y: AttentionOutputs) -> AttentionInputs:
        """Empty gradients of the inputs, in the memory layout of every implementation."""
        dq, dk, dv = (new_heads(t, t.shape[1], t.shape[3]) for t in (x.query, x.key, x.value))
        others = x.numerator, x.denominator, x.log_decay
        dS, dz, decay = (None if s is None else s.new_empty(s.shape) for s in others)
        return AttentionInputs(dq, dk, dv, numerator=dS, denominator=dz, log_decay=decay)


class MixedChunkInputs(NamedTuple):
    """Inputs of mixed chunk attention.

    The last fields are the state before the call: sums over complete groups, and the tokens of the
    open group, which is not complete yet.
    """

    quad_query: Tensor  # [B, H, T, K]
    quad_key: Tensor  # [B, G, T, K]
    lin_query: Tensor  # [B, H, T, L]
    lin_key: Tensor  # [B, G, T, L]
    value: Tensor  # [B, G, T, V]
    bias: Tensor | None = None  # [1 or H, g, g]
    key_mask: Tensor | None = None  # [B, T] bool
    cu_seqlens: Tensor | None = None  # [N + 1]
    numerator: Tensor | None = None  # [N, G, L, V]
    open_quad_key: Tensor | None = None  # [N, G, g, K]
    open_lin_key: Tensor | None = None  # [N, G, g, L]
    open_value: Tensor | None = None  # [N, G, g, V]
    position: Tensor | None = None  # [N], tokens so far
    seed: Tensor | None = None  # [1], of dropout

    @property
    def tokens(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.quad_query, self.quad_key, self.lin_query, self.lin_key, self.value

    @property
    def sums(self) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """The state without its position."""
        return self.numerator, self.open_quad_key, self.open_lin_key, self.open_value

    @property
    def covers_tokens(self) -> bool:
        """Whether every token is in a sequence, so that kernels write every row of the results."""
        return self.key_mask is None and self.cu_seqlens is None

    def one_token(self) -> MixedChunkInputs:
        """A row's first token, without masks, packing and state."""
        q, k, r, s, v = (x[:1, :, :1] for x in self.tokens)
        return MixedChunkInputs(q, k, r, s, v, self.bias)


class MixedChunkOutputs(NamedTuple):
    """Outputs of mixed chunk attention. The state is in the dtype of sums, or empty."""

    out: Tensor  # [B, H, T, V], in value's dtype
    final_numerator: Tensor
    final_quad_key: Tensor
    final_lin_key: Tensor
    final_value: Tensor

    @property
    def state(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.final_numerator, self.final_quad_key, self.final_lin_key, self.final_value


class MixedChunkSpec(NamedTuple):
    """Options of mixed chunk attention."""

    group_size: int
    activation: str  # "relu2" or "laplace"
    is_causal: bool
    reduce_groups: bool  # whether linear sums are over all groups, not only the token's own
    dropout_p: float
    returns_state: bool
    span: int = 0  # the fewest tokens for a thread, where threads share one sequence

    def state_shapes(self, x: MixedChunkInputs) -> tuple[tuple[int, ...], ...]:
        (B, G, _, V), K, L = x.value.shape, x.quad_key.shape[3], x.lin_key.shape[3]
        rows = sequence_count(B, x.cu_seqlens), G
        g = self.group_size
        return (*rows, L, V), (*rows, g, K), (*rows, g, L), (*rows, g, V)

    def new_outputs(self, x: MixedChunkInputs) -> MixedChunkOutputs:
        shapes = self.state_shapes(x) if self.returns_state else ((0,),) * 4
        state = (x.value.new_empty(shape, dtype=accumulation_dtype(x.value)) for shape in shapes)
        return MixedChunkOutputs(
            new_heads(x.value, x.quad_query.shape[1], x.value.shape[3]), *state
        )

    def new_gradients(self, x: MixedChunkInputs, y: MixedChunkOutputs) -> MixedChunkInputs:
        tokens = [new_heads(t, t.shape[1], t.shape[3]) for t in x.tokens]
        bias, *state = (None if t is None else t.new_empty(t.shape) for t in (x.bias, *x.sums))
        return mixed_chunk_gradients(tokens, bias, state)


def mixed_chunk_gradients(
    tokens: Sequence[Tensor], bias: Tensor | None, sums: Sequence[Tensor | None]
) -> MixedChunkInputs:
    """The gradients of tokens, bias and state under the names of the inputs."""
    quad_query, quad_key, lin_query, lin_key, value = tokens
    numerator, open_quad_key, open_lin_key, open_value = sums
    return MixedChunkInputs(
        quad_query,
        quad_key,
        lin_query,
        lin_key,
        value,
        bias,
        None,
        None,
        numerator,
        open_quad_key,
        open_lin_key,
        open_value,
    )


class GatedInputs(NamedTuple):
    """Inputs of gated attention."""

    query: Tensor  # [B, H, T, K]
    key: Tensor  # [B, G, S, K]
    value: Tensor  # [B, G, S, V]
    scale: Tensor  # [B or 1, T or 1], 1 / n
    bias: Tensor | None = None  # [B or 1, H or 1, T, S]
    cu_seqlens: Tensor | None = None  # [N + 1]
    seed: Tensor | None = None  # [1], of dropout


class GatedOutputs(NamedTuple):
    """The output of gated attention."""

    out: Tensor  # [B, H, T, V], in query's dtype


class GatedSpec(NamedTuple):
    """Options of gated attention."""

    activation: str  # "relu2" or "laplace"
    is_causal: bool
    dropout_p: float
    block: int = 0  # queries whose weights exist at once, which each implementation chooses

    def new_outputs(self, x: GatedInputs) -> GatedOutputs:
        return GatedOutputs(new_heads(x.query, x.query.shape[1], x.value.shape[3]))

    def new_gradients(self, x: GatedInputs, y: GatedOutputs) -> GatedInputs:
        dq, dk, dv = (new_heads(t, t.shape[1], t.shape[3]) for t in (x.query, x.key, x.value))
        bias = None if x.bias is None else x.bias.new_empty(x.bias.shape)
        return GatedInputs(dq, dk, dv, None, bias)  # type: ignore[arg-type]


class ElitaInputs(NamedTuple):
    """Inputs of ELiTA's attention. The logits share one dtype, fp32 or fp64; -inf is no weight."""

    key_logit: Tensor  # c, [B, G, T]
    query_logit: Tensor  # r, [B, H, T]
    self_logit: Tensor  # s, [B, H, T]
    value: Tensor  # [B, G, T, V]
    first: Tensor | None = None  # [T] bool, True where a packed sequence begins
    log_weight: Tensor | None = None  # m [B, G], in fp64, of the state before the call
    mean: Tensor | None = None  # u [B, G, V], in fp64, of the state before the call

    @property
    def past(self) -> tuple[Tensor, Tensor] | None:
        return (
            None if self.log_weight is None or self.mean is None else (self.log_weight, self.mean)
        )

    def one_token(self) -> ElitaInputs:
        """A row's first token, without packing and state."""
        return ElitaInputs(*(x[:1, :, :1] for x in self[:4]))


class ElitaOutputs(NamedTuple):
    """Outputs of ELiTA's attention.

    The backward pass reads the odds a / (1 - a) and g / (1 - g) of the gates, in the dtype of sums.
    """

    out: Tensor  # [B, H, T, V], in value's dtype
    key_odds: Tensor  # of a, [B, G, T]
    own_odds: Tensor  # of g, [B, H, T]
    # u before each block of tokens, [B, G, T // block + 2, V] in fp64; empty without blocks
    means: Tensor
    # m before each block, [B, G, T // block + 2] in fp64; empty unless chunks are the blocks
    log_weights: Tensor
    final_log_weight: Tensor
    final_mean: Tensor


class ElitaSpec(NamedTuple):
    """Options of ELiTA's attention, all chosen by its implementations."""

    chunk: int = 0  # tokens in a chunk
    span: int = 0  # the fewest tokens for a thread, where threads share one sequence
    block: int = 0  # tokens between two saved means; 0 saves none

    def new_outputs(self, x: ElitaInputs) -> ElitaOutputs:
        (B, G, T, V), H, dtype = x.value.shape, x.query_logit.shape[1], accumulation_dtype(x.value)
        # One or two rows of means are never used. Under torch.export a size that may be 1 would
        # limit T.
        means = (B, G, T // self.block + 2, V) if self.block else (0,)
        log_weights = means[:3] if self.block and self.chunk else (0,)
        return ElitaOutputs(
            new_heads(x.value, H, V),
            x.value.new_empty((B, G, T), dtype=dtype),
            x.value.new_empty((B, H, T), dtype=dtype),
            x.value.new_empty(means, dtype=torch.float64),
            x.value.new_empty(log_weights, dtype=torch.float64),
            x.value.new_empty((B, G), dtype=torch.float64),
            x.value.new_empty((B, G, V), dtype=torch.float64),
        )

    def new_gradients(self, x: ElitaInputs, y: ElitaOutputs) -> ElitaInputs:
        dc, dr, ds = (t.new_empty(t.shape) for t in (x.key_logit, x.query_logit, x.self_logit))
        dm, du = (None if s is None else s.new_empty(s.shape) for s in (x.log_weight, x.mean))
        return ElitaInputs(dc, dr, ds, new_heads(x.value, *x.value.shape[1::2]), None, dm, du)
