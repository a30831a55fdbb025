"""One operation as `torch.library` operators, for all implementations at once.

The schema, the fake kernel, the gradients and the `vmap` rule follow from the operation's classes
in `spec.py`. An implementation is a module, or an object, with two functions:

    forward(inputs, spec) -> outputs
    backward(upstream, inputs, outputs, spec) -> gradients of the inputs

`upstream` has the class of the outputs, and the gradients have the class of the inputs, with None
for tensors that have no gradient. A third function, `forward_only`, is optional. It may leave out
the outputs that only the backward pass reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, TypeVar, get_type_hints

import torch
from torch import Tensor

from ..backends import load_implementation
from ..product import is_plain_call
from ..transforms import mappable

Inputs = TypeVar("Inputs", bound=tuple[Any, ...])
Outputs = TypeVar("Outputs", bound=tuple[Any, ...])
Spec = TypeVar("Spec", bound=tuple[Any, ...])

# The types of annotations, as schemas name them.
_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    bool: "bool",
    int: "SymInt",
    float: "float",
    str: "str",
    torch.dtype: "ScalarType",
}


def _schema_arguments(kind: type, names: Iterable[str]) -> list[str]:
    """The fields `names` of a class as arguments of a schema."""
    hints = get_type_hints(kind)
    return [f"{_TYPES[hints[name]]} {name}" for name in names]


def _format_schema(arguments: list[str], results: int) -> str:
    returned = ", ".join(["Tensor"] * results)
    return f"({', '.join(arguments)}) -> {returned if results == 1 else f'({returned})'}"


def _pack_results(tensors: Sequence[Tensor | None], like: Tensor) -> Any:
    """The results as an operator returns them: empty tensors for None, and no tuple of one."""
    found = tuple(like.new_empty(0) if x is None else x for x in tensors)
    return found if len(found) > 1 else found[0]


def _unpack_results(returned: Any) -> Sequence[Tensor]:
    return returned if isinstance(returned, tuple | list) else (returned,)


def _places(kind: Any, names: Sequence[str], first: int) -> list[int | None]:
    """Where arguments, from `first` on those named, have each field of `kind`; None where not."""
    return [first + names.index(x) if x in names else None for x in kind._fields]


def _fill_fields(kind: Any, places: list[int | None], arguments: Sequence[Any]) -> Any:
    """`kind` with arguments as its fields, and None where they have none."""
    return kind(*[None if i is None else arguments[i] for i in places])


class Operator(Generic[Inputs, Outputs, Spec]):
    """The operators ``cumulant::<name>`` and ``cumulant::<name>_backward`` of an operation.

    module: the name of the operation's module in every implementation.
    differentiable: the inputs that have gradients.
    carriers: the outputs whose gradients the backward pass takes, the attention's output first.
    saved_inputs, saved_outputs: saved for the backward pass, which gets None for all others.
    """

    def __init__(
        self,
        name: str,
        module: str,
        inputs: type[Inputs],
        outputs: type[Outputs],
        spec: type[Spec],
        *,
        differentiable: Sequence[str],
        carriers: Sequence[str] = ("out",),
        saved_inputs: Sequence[str] | None = None,
        saved_outputs: Sequence[str] = (),
    ):
        self.module = module
        self._inputs: Any = inputs
        self.outputs: Any = outputs
        self._spec: Any = spec
        self._input_names: Sequence[str] = inputs._fields  # type: ignore[attr-defined]
        self._output_names: Sequence[str] = outputs._fields  # type: ignore[attr-defined]
        self._options: Sequence[str] = spec._fields  # type: ignore[attr-defined]
        self._differentiable, self._carriers = differentiable, carriers
        self._saved_inputs = self._input_names if saved_inputs is None else saved_inputs
        self._saved_outputs = saved_outputs
        n, m = len(carriers), len(carriers) + len(self._saved_inputs)
        self._backward_places = (
            _places(outputs, carriers, 0),
            _places(inputs, self._saved_inputs, n),
            _places(outputs, saved_outputs, m),
        )
        options = [*_schema_arguments(spec, self._options), "str impl"]
        forward = [*_schema_arguments(inputs, self._input_names), *options]
        backward = [
            *(f"{'Tensor?' if i else 'Tensor'} d{name}" for i, name in enumerate(carriers)),
            *_schema_arguments(inputs, self._saved_inputs),
            *(f"Tensor {name}" for name in saved_outputs),
            *options,
        ]
        self.forward = self._register_operator(
            name,
            _format_schema(forward, len(self._output_names)),
            self._run_forward,
            self._fake_forward,
        )
        self.backward = self._register_operator(
            f"{name}_backward",
            _format_schema(backward, len(differentiable)),
            self._run_backward,
            self._fake_backward,
        )
        self.forward.register_autograd(self._differentiate, setup_context=self._setup_context)
        self._mapped_backward = mappable(self.backward)
        self._mapped = mappable(self.forward, self._setup_context, self._differentiate)
        eager = {
            "forward": staticmethod(self._run_eagerly),
            "backward": staticmethod(self._differentiate_eagerly),
        }
        self._eager: Any = type(f"Eager_{name}", (torch.autograd.Function,), eager)

    @staticmethod
    def _register_operator(
        name: str, schema: str, run: Callable[..., Any], fake: Callable[..., Any]
    ) -> Any:
        operator = torch.library.custom_op(f"cumulant::{name}", run, mutates_args=(), schema=schema)
        operator.register_fake(fake)
        return operator

    def __call__(self, impl: str, inputs: Inputs, spec: Spec) -> Outputs:
        """The outputs by implementation `impl`.

        A plain call avoids the operator, because its dispatch takes longer than a short call.
        """
        if not is_plain_call(*inputs):
            results = self._mapped(*self.forward_arguments(impl, inputs, spec))
        elif torch.is_grad_enabled() and self.differentiates(inputs):
            return self.run_differentiably(impl, inputs, spec)
        else:
            module = load_implementation(impl, self.module)
            found: Outputs = getattr(module, "forward_only", module.forward)(inputs, spec)
            return found
        found = self.outputs(*_unpack_results(results))
        return found

    def differentiates(self, inputs: Inputs) -> bool:
        """Whether any input needs a gradient."""
        for x in inputs:  # noqa: SIM110  (a generator takes twice as long)
            if x is not None and x.requires_grad:
                return True
        return False

    def run_differentiably(
        self,
        impl: str,
        inputs: Inputs,
        spec: Spec,
        implementation: Any = None,
    ) -> Outputs:
        """The outputs of a plain call, with gradients.

        implementation: an object with `forward` and `backward`, in the place of `impl`'s module.
        """
        results = self._eager.apply(*inputs, spec, impl, implementation)
        found: Outputs = self.outputs(*_unpack_results(results))
        return found

    def forward_arguments(self, impl: str, inputs: Inputs, spec: Spec) -> list[Any]:
        """A call's arguments in the order of the schema of `forward`."""
        return [*inputs, *spec, impl]

    def backward_arguments(
        self, impl: str, upstream: Outputs, inputs: Inputs, outputs: Outputs, spec: Spec
    ) -> list[Any]:
        """A backward call's arguments in the order of the schema of `backward`."""
        sources = (
            (upstream, self._carriers),
            (inputs, self._saved_inputs),
            (outputs, self._saved_outputs),
        )
        tensors = [getattr(source, name) for source, names in sources for name in names]
        return [*tensors, *spec, impl]

    # The functions behind the operators. `arguments` are those of the schemas.

    def _unpack_forward(self, arguments: Sequence[Any]) -> tuple[Inputs, Spec, str]:
        n = len(self._input_names)
        return self._inputs(*arguments[:n]), self._spec(*arguments[n:-1]), arguments[-1]

    def _run_forward(self, *arguments: Any) -> Any:
        inputs, spec, impl = self._unpack_forward(arguments)
        module = load_implementation(impl, self.module)
        return _pack_results(module.forward(inputs, spec), inputs[0])

    def _fake_forward(self, *arguments: Any) -> Any:
        inputs, spec, _ = self._unpack_forward(arguments)
        return _pack_results(spec.new_outputs(inputs), inputs[0])  # type: ignore[attr-defined]

    def _unpack_backward(
        self, arguments: Sequence[Any]
    ) -> tuple[Outputs, Inputs, Outputs, Spec, str]:
        *options, impl = arguments[-len(self._options) - 1 :]
        return *self._backward_parts(arguments), self._spec(*options), impl

    def _backward_parts(self, arguments: Sequence[Any]) -> tuple[Outputs, Inputs, Outputs]:
        """Gradients of the outputs, inputs and outputs, from the arguments of `backward`."""
        upstream, inputs, outputs = self._backward_places
        return (
            _fill_fields(self.outputs, upstream, arguments),
            _fill_fields(self._inputs, inputs, arguments),
            _fill_fields(self.outputs, outputs, arguments),
        )

    def _run_backward(self, *arguments: Any) -> Any:
        upstream, inputs, outputs, spec, impl = self._unpack_backward(arguments)
        gradients = load_implementation(impl, self.module).backward(upstream, inputs, outputs, spec)
        return self._pack_gradients(gradients, arguments[0])

    def _fake_backward(self, *arguments: Any) -> Any:
        _, inputs, outputs, spec, _ = self._unpack_backward(arguments)
        gradients = spec.new_gradients(inputs, outputs)  # type: ignore[attr-defined]
        return self._pack_gradients(gradients, arguments[0])

    def _pack_gradients(self, gradients: Inputs, like: Tensor) -> Any:
        return _pack_results([getattr(gradients, name) for name in self._differentiable], like)

    # Differentiation by autograd. The same two functions serve inside `torch.func`.

    def _setup_context(self, ctx: Any, inputs: Sequence[Any], output: Any) -> None:
        self._save_for_backward(
            ctx, *self._unpack_forward(inputs), self.outputs(*_unpack_results(output))
        )

    def _save_for_backward(
        self, ctx: Any, given: Inputs, spec: Spec, impl: str, found: Outputs
    ) -> None:
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(
            *(getattr(found, name) for name in self._output_names if name not in self._carriers)
        )
        kept = [getattr(given, name) for name in self._saved_inputs]
        ctx.save_for_backward(*kept, *(getattr(found, name) for name in self._saved_outputs))
        ctx.spec, ctx.impl, ctx.given = spec, impl, [x is not None for x in given]
        ctx.out_shape, ctx.out_dtype = found[0].shape, found[0].dtype

    def _differentiate(self, ctx: Any, *gradients: Any) -> Any:
        found = self._mapped_backward(*self._backward_tensors(ctx, gradients), *ctx.spec, ctx.impl)
        of_options = [None] * (len(self._options) + 1)  # of the options and `impl`
        return *self._input_gradients(ctx, _unpack_results(found)), *of_options

    # Differentiation by autograd in a plain call, without the operators.

    def _run_eagerly(self, ctx: Any, *arguments: Any) -> Any:
        *tensors, spec, impl, implementation = arguments
        inputs = self._inputs(*tensors)
        ctx.implementation = implementation or load_implementation(impl, self.module)
        results = _pack_results(ctx.implementation.forward(inputs, spec), inputs[0])
        self._save_for_backward(ctx, inputs, spec, impl, self.outputs(*_unpack_results(results)))
        return results

    def _differentiate_eagerly(self, ctx: Any, *gradients: Any) -> Any:
        tensors = self._backward_tensors(ctx, gradients)
        # With gradients enabled, this gradient may be differentiated again.
        if is_plain_call(*tensors) and not torch.is_grad_enabled():
            parts = self._backward_parts(tensors)
            ours = ctx.implementation.backward(*parts, ctx.spec)
            found: Sequence[Any] = [getattr(ours, name) for name in self._differentiable]
        else:
            found = _unpack_results(self._mapped_backward(*tensors, *ctx.spec, ctx.impl))
        return *self._input_gradients(ctx, found), None, None, None

    def _backward_tensors(self, ctx: Any, gradients: Sequence[Any]) -> list[Any]:
        """The tensor arguments of a call of `backward`."""
        saved = ctx.saved_tensors  # read only once: checkpointing allows no second read
        by_name = dict(zip(self._output_names, gradients, strict=True))
        dout, *rest = (by_name[name] for name in self._carriers)
        if dout is None:
            like = next(x for x in saved if x is not None)
            dout = like.new_zeros(ctx.out_shape, dtype=ctx.out_dtype)
        if not getattr(ctx.spec, "returns_state", True):  # the call returned no state to users
            rest = [None] * len(rest)
        return [dout, *rest, *saved]

    def _input_gradients(self, ctx: Any, found: Sequence[Tensor]) -> list[Tensor | None]:
        """The gradient of every input, None for inputs without one."""
        ours = dict(zip(self._differentiable, found, strict=True))
        wanted = zip(self._input_names, ctx.given, strict=True)
        return [ours.get(name) if given else None for name, given in wanted]
