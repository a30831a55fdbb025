"""What the tests of modules share."""

import torch


def assert_agree(actual, exact, rtol=1e-9, atol=1e-10):
    """Pairwise, one for one."""
    for a, b in zip(actual, exact, strict=True):
        assert torch.allclose(a, b, rtol=rtol, atol=atol)


def lowered(mixer, dtype, x, **inputs):
    """A float64 mixer's exact output, then what it gives as a bfloat16 module or, for fp32, under
    autocast.
    """
    exact = mixer(x, **inputs).detach()
    if dtype == torch.float32:
        module = mixer.float()
        with torch.autocast("cpu", torch.bfloat16):
            y = module(x.float(), **{name: value.float() for name, value in inputs.items()})
    else:
        module = mixer.to(dtype)
        y = module(x.to(dtype), **{name: value.to(dtype) for name, value in inputs.items()})
    y.float().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in module.parameters())
    return exact, y.detach().double()


def spread(mixer):
    """Queries and keys far enough from zero to matter: they start 0.02 wide."""
    with torch.no_grad():
        mixer.offset_scale.gamma.normal_(std=2)
        mixer.offset_scale.beta.normal_()
        if mixer.relative_bias is not None:
            mixer.relative_bias.embedding.weight.normal_(std=0.3)
    return mixer
