"""What the tests of modules share: every mixer, and how outputs are compared."""

import torch

from cumulant import interop, nn

D = 24
MIXERS = {
    "taylor": lambda: nn.TaylorAttention(D, 4, head_dim=6),
    "taylor-everything": lambda: nn.TaylorAttention(
        D,
        4,
        num_kv_heads=2,
        head_dim=6,
        value_dim=5,
        rotary=True,
        gate_values=True,
        shift_tokens=True,
        conv_size=3,
    ),
    "taylor-4": lambda: nn.TaylorAttention(
        D, 4, head_dim=3, order=4, bias=True, prenorm=True, shift_tokens=True
    ),
    "taylor-uncombined": lambda: nn.TaylorAttention(
        D, 4, head_dim=6, combine_heads=False, gate_values=True
    ),
    "taylor-higher-order": lambda: nn.TaylorAttention(
        D, 4, head_dim=6, qk_norm=True, constant_term=False, rotary=True, conv_size=3
    ),
    "taylor-multi-query": lambda: nn.TaylorAttention(
        D, 4, num_kv_heads=1, head_dim=6, shift_tokens=True
    ),
    "linear": lambda: nn.LinearAttention(D, 4),
    "linear-everything": lambda: nn.LinearAttention(
        D, 4, num_kv_heads=2, rotary=True, gate_values=True, shift_tokens=True, conv_size=4
    ),
    "linear-softmax": lambda: nn.LinearAttention(D, 4, feature_map="softmax", conv_size=2),
    "linear-hedgehog": lambda: perturbed(
        nn.LinearAttention(D, 4, num_kv_heads=2, feature_map="hedgehog", bias=True)
    ),
    "linear-rebased": lambda: perturbed(
        nn.LinearAttention(D, 4, feature_map="rebased", prenorm=True, rotary=True)
    ),
    "linear-pair": lambda: nn.LinearAttention(
        D, 4, feature_map=(torch.exp, torch.nn.Softplus()), qk_norm=True
    ),
    "linear-module": lambda: nn.LinearAttention(
        D, 4, feature_map=torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Softplus())
    ),
    "taylor-fixed": lambda: nn.TaylorAttention(
        D, 4, head_dim=6, decay=nn.FixedDecay(4, spans=(0.5, 3, 100, float("inf")))
    ),
    "taylor-gated": lambda: forgetful(nn.TaylorAttention(D, 4, head_dim=6, decay="gated")),
    "taylor-gated-everything": lambda: forgetful(
        nn.TaylorAttention(
            D,
            4,
            num_kv_heads=2,
            head_dim=6,
            value_dim=5,
            rotary=True,
            prenorm=True,
            gate_values=True,
            shift_tokens=True,
            conv_size=3,
            decay="gated",
        )
    ),
    "linear-fixed": lambda: nn.LinearAttention(D, 4, num_kv_heads=2, conv_size=4, decay="fixed"),
    "linear-gated": lambda: forgetful(
        nn.LinearAttention(D, 4, feature_map="rebased", decay=nn.GatedDecay(D, 4, divisor=16))
    ),
    "linear-rebased-gated": lambda: forgetful(
        perturbed(
            nn.LinearAttention(
                D,
                4,
                num_kv_heads=2,
                feature_map="rebased",
                gate_values=True,
                shift_tokens=True,
                conv_size=3,
                decay="gated",
            )
        )
    ),
    "linear-mamba2": lambda: forgetful(nn.LinearAttention(D, 4, rotary=True, decay="mamba2")),
    "simple-gla": lambda: forgetful(interop.SimpleGatedLinearAttention(D, 4)),
    "simple-gla-everything": lambda: shaken(
        interop.SimpleGatedLinearAttention(
            D,
            4,
            num_kv_heads=2,
            head_dim=3,
            value_dim=5,
            feature_map="sigmoid",
            conv_bias=True,
            gate_fn="sigmoid",
            norm_affine=False,
        )
    ),
    "simple-gla-bare": lambda: forgetful(interop.SimpleGatedLinearAttention(D, 4, conv_size=0)),
    "mamba2": lambda: shaken(interop.Mamba2Mixer(D, num_heads=4, head_dim=6, state_dim=5)),
    "mamba2-everything": lambda: shaken(
        interop.Mamba2Mixer(
            D,
            num_heads=6,
            head_dim=4,
            state_dim=5,
            num_groups=2,
            conv_size=3,
            bias=True,
            skip_size=4,
            norm_before_gate=True,
            dt_limit=(0.02, 0.5),
        )
    ),
    "mamba2-bare": lambda: shaken(
        interop.Mamba2Mixer(
            D, num_heads=4, head_dim=3, state_dim=5, conv_size=1, conv_bias=False, norm_groups=0
        )
    ),
    "gau": lambda: spread(nn.GatedAttentionUnit(D, query_key_dim=6)),
    "gau-everything": lambda: spread(
        nn.GatedAttentionUnit(
            D,
            query_key_dim=6,
            activation="laplace",
            length_scale=9,
            scale_bias=True,
            norm="rmsnorm",
            rotary_dim=4,
        )
    ),
    "gau-bare": lambda: spread(
        nn.GatedAttentionUnit(
            D, query_key_dim=6, scale_bias=True, norm=None, residual=False, expansion_factor=0.5
        )
    ),
    "flash": lambda: spread(nn.MixedChunkAttention(D, group_size=4, query_key_dim=6)),
    "flash-everything": lambda: spread(
        nn.MixedChunkAttention(
            D,
            group_size=5,
            query_key_dim=6,
            expansion_factor=1.5,
            activation="laplace",
            norm="layernorm",
            shift_tokens=True,
            rotary_dim=4,
        )
    ),
    "flash-bare": lambda: spread(
        nn.MixedChunkAttention(
            D,
            group_size=7,
            query_key_dim=5,
            norm=None,
            residual=False,
            relative_bias=False,
            rotary_dim=0,
        )
    ),
    "elita": lambda: placed(nn.ElitaAttention(D, 4, features=3, horizon=10)),
    "elita-published": lambda: placed(
        nn.ElitaAttention(D, 3, head_dim=5, horizon=30, time=2.5, query_logit=False, clip=1.5)
    ),
    "softmax": lambda: nn.SoftmaxAttention(D, 4, num_kv_heads=2, rotary=True),
    "window": lambda: nn.SlidingWindowAttention(D, 4, num_kv_heads=2, rotary=True, window=5),
    "window-1": lambda: nn.SlidingWindowAttention(D, 4, window=1),
    "convolution": lambda: nn.GatedShortConvolution(D, size=3),
}


def assert_agree(actual, exact, rtol=1e-9, atol=1e-10):
    """Both lists are as long, and their tensors are close pair by pair."""
    for a, b in zip(actual, exact, strict=True):
        assert torch.allclose(a, b, rtol=rtol, atol=atol)


def lowered(mixer, dtype, x, **inputs):
    """A float64 mixer's output, then that of a bfloat16 module or, for fp32, under autocast."""
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
    """Widens queries and keys, which start at a standard deviation of 0.02."""
    with torch.no_grad():
        mixer.offset_scale.gamma.normal_(std=2)
        mixer.offset_scale.beta.normal_()
        if mixer.relative_bias is not None:
            mixer.relative_bias.embedding.weight.normal_(std=0.3)
    return mixer


def perturbed(mixer):
    """Moves learned feature maps away from where they start."""
    with torch.no_grad():
        for part in (mixer.query_map, mixer.key_map):
            for p in part.parameters():
                p.add_(0.3 * torch.randn_like(p))
    return mixer


def shaken(mixer):
    """Moves all weights, so that no bias is 0 and no scale 1."""
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return mixer


def forgetful(mixer):
    """Gives tokens decays of their own, and shorter spans, than those at which gates start."""
    with torch.no_grad():
        mixer.decay.weight.normal_(std=0.5)
        bias, change = (
            (mixer.decay.dt_bias, 3)
            if isinstance(mixer.decay, nn.Mamba2Decay)
            else (mixer.decay.bias, -5)
        )
        bias.add_(change)
    return mixer


def placed(mixer):
    """Widens logits of content and of position, which start near zero."""
    with torch.no_grad():
        mixer.logit_proj.weight.normal_(std=0.3)
        for p in mixer.position.parameters():
            p.normal_(std=2)
    return mixer
