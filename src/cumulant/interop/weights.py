"""Reading another package's weights: by name, each exactly once."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn


class Weights:
    """A state dict that is used up as it is read, so that nothing in it is overlooked."""

    def __init__(self, source: nn.Module | Mapping[str, Tensor], package: str):
        if not isinstance(source, (nn.Module, Mapping)):
            raise TypeError(f"source: expected a module of {package} or its state dict, got {type(source).__name__}")
        state = source.state_dict() if isinstance(source, nn.Module) else source
        self.left = {name: x.detach() for name, x in state.items()}
        self.package = package

    def __contains__(self, name: str) -> bool:
        return name in self.left

    def drop_prefix(self, prefix: str) -> None:
        """Names without `prefix`, where all have it."""
        if self.left and all(name.startswith(prefix) for name in self.left):
            self.left = {name[len(prefix) :]: x for name, x in self.left.items()}

    def take(self, name: str) -> Tensor:
        if name not in self.left:
            found = ", ".join(sorted(self.left)[:6]) or "nothing"
            raise ValueError(f"source: {name!r} is missing, so these are not weights of {self.package}; found {found}")
        return self.left.pop(name)

    def load(self, module: nn.Module, weights: Mapping[str, Tensor], source: object) -> None:
        """Give `weights` to `module`, with their dtype and device; refuses leftovers and shapes that do not fit."""
        if self.left:
            raise ValueError(f"source: {sorted(self.left)[0]!r} has no place in {type(module).__name__}")
        like = next(iter(weights.values()))
        module.to(device=like.device, dtype=like.dtype)
        expected = module.state_dict()
        for name, x in weights.items():
            if name in expected and expected[name].shape != x.shape:
                raise ValueError(
                    f"source: the weight for {name} has shape {list(x.shape)}, expected {list(expected[name].shape)}; "
                    "check the number of heads"
                )
        # a feature map given beside the weights keeps its own
        own = ("feature_map.", "query_map.", "key_map.")
        assert set(weights) <= set(expected)
        assert all(name in weights or name.startswith(own) for name in expected)
        module.load_state_dict(weights, strict=False)
        if isinstance(source, nn.Module):
            module.train(source.training)
