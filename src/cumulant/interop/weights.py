"""Reading another package's weights: by name, each exactly once."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn


class Weights:
    """A state dict that is used up as it is read, so that nothing in it is overlooked."""

    def __init__(self, source: nn.Module | Mapping[str, Tensor], package: str):
        if not isinstance(source, (nn.Module, Mapping)):
            raise TypeError(
                f"source: expected a module of {package} or its state dict, got"
                f" {type(source).__name__}"
            )
        state = source.state_dict() if isinstance(source, nn.Module) else source
        self.left = {name: x.detach() for name, x in state.items()}
        self.package = package

    def __contains__(self, name: str) -> bool:
        return name in self.left

    def take(self, name: str) -> Tensor:
        if name not in self.left:
            found = ", ".join(sorted(self.left)[:6]) or "nothing"
            raise ValueError(
                f"source: {name!r} is missing, so these are not weights of {self.package}; found"
                f" {found}"
            )
        return self.left.pop(name)

    def below(self, prefix: str) -> dict[str, Tensor]:
        """All that is left under `prefix`, without it."""
        names = [name for name in self.left if name.startswith(prefix)]
        return {name[len(prefix) :]: self.left.pop(name) for name in names}

    def load(self, module: nn.Module, weights: Mapping[str, Tensor], source: object) -> None:
        """Give copies of `weights`, their dtypes and devices kept, to `module`; refuses leftovers
        and wrong shapes.
        """
        if self.left:
            raise ValueError(
                f"source: {sorted(self.left)[0]!r} has no place in {type(module).__name__}"
            )
        expected = module.state_dict()
        # a feature map given beside the weights keeps its own
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
