"""Reads another package's weights by name, each exactly once."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn


class Weights:
    """A state dict that loses each weight that is read, so none is overlooked."""

    def __init__(self, source: nn.Module | Mapping[str, Tensor], package: str):
        if not isinstance(source, (nn.Module, Mapping)):
            raise TypeError(
                f"source: expected a module of {package} or its state dict, got"
                f" {type(source).__name__}"
            )
        state = source.state_dict() if isinstance(source, nn.Module) else source
        self.remaining = {name: x.detach() for name, x in state.items()}
        self.package = package

    def __contains__(self, name: str) -> bool:
        return name in self.remaining

    def pop_weight(self, name: str) -> Tensor:
        """The weight of that name, which is then removed."""
        if name not in self.remaining:
            found = ", ".join(sorted(self.remaining)[:6]) or "nothing"
            raise ValueError(
                f"source: {name!r} is missing, so these are not weights of {self.package}; found"
                f" {found}"
            )
        return self.remaining.pop(name)

    def pop_below(self, prefix: str) -> dict[str, Tensor]:
        """Pop all weights under `prefix`; their names come without it."""
        names = [name for name in self.remaining if name.startswith(prefix)]
        return {name[len(prefix) :]: self.remaining.pop(name) for name in names}

    def load(self, module: nn.Module, weights: Mapping[str, Tensor], source: object) -> None:
        """Load copies of `weights` into `module`; leftovers and wrong shapes are errors."""
        if self.remaining:
            raise ValueError(
                f"source: {sorted(self.remaining)[0]!r} has no place in {type(module).__name__}"
            )
        expected = module.state_dict()
        # a feature map that the user passed keeps its own weights
        own = ("feature_map.", "query_map.", "key_map.")
        for name in [*weights, *(n for n in expected if not n.startswith(own))]:
            if name not in weights or name not in expected:
                raise ValueError(
                    f"source: {type(module).__name__} and these weights differ in {name}"
                )
            if expected[name].shape != weights[name].shape:
                raise ValueError(
                    f"source: the weight for {name} has shape {list(weights[name].shape)}, "
                    f"expected {list(expected[name].shape)}; check the number of heads"
                )
        module.load_state_dict(
            {name: x.clone() for name, x in weights.items()}, strict=False, assign=True
        )
        if isinstance(source, nn.Module):
            module.train(source.training)
