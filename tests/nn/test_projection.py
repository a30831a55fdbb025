"""The linear layers of modules are PyTorch's own, so replacing or hooking one takes effect."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from cumulant.nn import projection
from cumulant.nn.projection import is_plain, project

from .common import MIXERS


@pytest.fixture
def layer():
    return nn.Linear(64, 300)


@pytest.fixture
def x():
    return torch.randn(3, 200, 64)


def test_a_plain_layer_is_the_fast_product(layer, x, monkeypatch):
    calls, run = [], projection.multiply
    monkeypatch.setattr(projection, "multiply", lambda *a: calls.append(1) or run(*a))
    assert torch.allclose(project(layer, x), layer(x), atol=1e-5)
    assert calls


def doubled(*arguments):
    return 2 * arguments[-1]


class Doubled(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


class TwiceAsLarge(nn.Module):
    def forward(self, weight):
        return 2 * weight


def replaced_forward(layer):
    original = layer.forward
    layer.forward = lambda x: 2 * original(x)


def another_class(layer):
    layer.__class__ = Doubled


WATCHED = {
    "forward hook": lambda layer: layer.register_forward_hook(doubled),
    "forward hook with keywords": lambda layer: layer.register_forward_hook(
        lambda module, args, kwargs, out: 2 * out, with_kwargs=True
    ),
    "forward pre-hook": lambda layer: layer.register_forward_pre_hook(
        lambda module, args: (2 * args[0],)
    ),
    "forward of the object": replaced_forward,
    "subclass": another_class,
    "parametrization": lambda layer: parametrize.register_parametrization(
        layer, "weight", TwiceAsLarge()
    ),
}


@pytest.mark.parametrize("how", WATCHED)
def test_whatever_stands_in_its_place_takes_effect(layer, x, how):
    before = project(layer, x)
    WATCHED[how](layer)
    assert not is_plain(layer)
    assert torch.equal(project(layer, x), layer(x))
    assert not torch.allclose(project(layer, x), before, atol=1e-3)


@pytest.mark.parametrize(
    "register", ["register_module_full_backward_hook", "register_module_forward_hook"]
)
def test_hooks_on_all_modules_are_called(layer, x, register):
    seen = []
    handle = getattr(nn.modules.module, register)(lambda module, *_: seen.append(module) and None)
    try:
        project(layer, x.requires_grad_()).sum().backward()
    finally:
        handle.remove()
    assert seen == [layer]


def test_backward_hooks_are_called(layer, x):
    seen = []
    layer.register_full_backward_hook(lambda module, before, after: seen.append(len(after)))
    project(layer, x.requires_grad_()).sum().backward()
    assert seen == [1]


def test_a_method_set_on_the_class(layer, x, monkeypatch):
    original = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, input: 2 * original(self, input))
    assert torch.allclose(project(layer, x), 2 * original(layer, x))


@pytest.mark.parametrize("name", MIXERS)
def test_every_layer_of_a_mixer_is_called(name):
    """A hook on each of its linear layers is called in a forward pass."""
    torch.manual_seed(0)
    mixer = MIXERS[name]()
    layers = {n: m for n, m in mixer.named_modules() if isinstance(m, nn.Linear)}
    assert layers
    assert all(type(m) is nn.Linear for m in layers.values())
    called = []
    for one, layer in layers.items():
        layer.register_forward_hook(lambda *_, one=one: called.append(one))
    mixer(torch.randn(2, 6, mixer.dim))
    assert set(called) == set(layers)
