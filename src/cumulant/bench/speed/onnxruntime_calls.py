"""onnxruntime's operators of attention, as functions without arguments.

- `LinearAttention`, ``S_t = exp(g_t) S_(t-1) + k_t v_tᵀ`` and ``o_t = S_tᵀ q_t``, with the state
  before and after. It has no feature map and no normaliser. ONNX's opset 27 has an operator of this
  name that computes the same. onnxruntime 1.32 runs it more slowly than its own of the domain
  ``com.microsoft``, which is taken here.
- `GroupQueryAttention`, softmax attention with the keys and values of earlier tokens in one buffer.
  It is the one of onnxruntime's operators for the CPU that does not keep all T × S weights.

Inputs and outputs are bound before the first call, so a call copies neither, and the next call
writes over the results of the one before. Tensors are ``[B, H, T, K]`` in fp32. With the heads of a
token side by side in memory, as projections write them, they are read where they are.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

NEEDED = {"onnx": (1, 23), "onnxruntime": (1, 32)}
Call = Callable[[], tuple[Tensor, ...]]


def missing_packages() -> str | None:
    """The packages that must be installed; None if all are there."""
    lacking = [
        f"{name}>={'.'.join(map(str, least))}"
        for name, least in NEEDED.items()
        if _installed(name) < least
    ]
    return " and ".join(lacking) or None


def _installed(name: str) -> tuple[int, ...]:
    """The first two numbers of the package's version; none if it is not installed."""
    try:
        return tuple(int(part) for part in version(name).split(".")[:2])
    except (PackageNotFoundError, ValueError):
        return ()


def linear_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: Tensor | None = None,
    *,
    log_decay: Tensor | None = None,
) -> Call:
    """A call that returns the outputs ``[B, H, T, V]`` and the state ``[B, H, K, V]``.

    It runs on as many threads as torch.

    Args:
        query, key, value: ``[B, H, T, K]``, ``[B, H, T, K]`` and ``[B, H, T, V]``.
        state: ``[B, H, K, V]``, the state before; by default zeros.
        log_decay: g, ``[B, H, T]``, not positive; by default no decay.
    """
    B, H, T, K = query.shape
    V = value.shape[-1]
    inputs = {"query": _packed(query), "key": _packed(key), "value": _packed(value)}
    inputs["past_state"] = torch.zeros(B, H, K, V) if state is None else state.contiguous()
    if log_decay is not None:
        inputs["decay"] = log_decay.transpose(1, 2).contiguous()
    outputs = {"output": torch.empty(B, T, H * V), "present_state": torch.empty(B, H, K, V)}
    operator = _BoundOperator(
        "LinearAttention",
        inputs,
        outputs,
        q_num_heads=H,
        kv_num_heads=H,
        update_rule="linear" if log_decay is None else "gated",
        scale=1.0,
    )
    return operator.returning(_by_head(outputs["output"], H), outputs["present_state"])


def softmax_call(query: Tensor, key: Tensor, value: Tensor) -> Call:
    """A call that returns the outputs ``[B, H, T, K]`` of causal softmax attention.

    It runs on as many threads as torch.

    Args:
        query: ``[B, H, T, K]``, of the last T of S tokens. If T is neither 1 nor S, B must be 1.
        key, value: ``[B, H, S, K]``. The first S - T are in the buffer already; a call adds the
            others to it.
    """
    B, H, T, _ = query.shape
    S = key.shape[2]
    buffers = {"key_buffer": key.contiguous(), "value_buffer": value.contiguous()}
    inputs = {
        "query": _packed(query),
        "key": _packed(key[:, :, S - T :]),
        "value": _packed(value[:, :, S - T :]),
        **buffers,
        "seqlens_k": torch.full((B,), S - 1, dtype=torch.int32),
        "total_sequence_length": torch.tensor(S, dtype=torch.int32),
    }
    output = torch.empty_like(inputs["query"])
    outputs = {"output": output, "present_key": buffers["key_buffer"]}
    outputs["present_value"] = buffers["value_buffer"]
    operator = _BoundOperator("GroupQueryAttention", inputs, outputs, num_heads=H, kv_num_heads=H)
    return operator.returning(_by_head(output, H))


def _packed(x: Tensor) -> Tensor:
    """``[B, H, T, K]`` as ``[B, T, H · K]``, which copies nothing in the usual layout."""
    return x.transpose(1, 2).flatten(2).contiguous()


def _by_head(x: Tensor, heads: int) -> Tensor:
    B, T, _ = x.shape
    return x.view(B, T, heads, -1).transpose(1, 2)


class _BoundOperator:
    """A model of one operator, which runs on these tensors and on torch's threads.

    A tensor that is both an input and an output is changed in place.
    """

    def __init__(
        self,
        operator: str,
        inputs: dict[str, Tensor],
        outputs: dict[str, Tensor],
        **attributes: Any,
    ) -> None:
        import onnxruntime
        from onnx import helper

        node = helper.make_node(
            operator, list(inputs), list(outputs), domain="com.microsoft", **attributes
        )
        graph = helper.make_graph([node], "attention", *map(_describe, (inputs, outputs)))
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3  # errors
        self.session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        self.binding = self.session.io_binding()
        self.held = inputs, outputs  # only the addresses are bound
        for bind, tensors in (
            (self.binding.bind_input, inputs),
            (self.binding.bind_output, outputs),
        ):
            for name, x in tensors.items():
                bind(name, "cpu", 0, x.numpy().dtype.type, list(x.shape), x.data_ptr())

    def returning(self, *results: Tensor) -> Call:
        """A function that runs the operator and returns these, views of its outputs."""

        def call() -> tuple[Tensor, ...]:
            self.session.run_with_iobinding(self.binding)
            return results

        return call


def _describe(tensors: dict[str, Tensor]) -> list[Any]:
    """ONNX's descriptions of the tensors."""
    from onnx import TensorProto, helper

    kinds = {torch.float32: TensorProto.FLOAT, torch.int32: TensorProto.INT32}
    return [
        helper.make_tensor_value_info(name, kinds[x.dtype], list(x.shape))
        for name, x in tensors.items()
    ]
