"""Attention modules and their parts. Every causal mixer has one protocol::

    y = mixer(x, key_mask=None, cu_seqlens=None)
    y, state = mixer(x, key_mask=None, state=None, return_state=True)

x is ``[B, T, D]``. ``key_mask [B, T]`` is True at tokens. Masked positions, wherever they are,
change no other output, and their own outputs are zero. ``cu_seqlens [N + 1]`` are the offsets of
sequences packed end to end in one row (B = 1). A state continues the sequence: outputs are the same
for the whole sequence, for any split, and for one token at a time.

With ``is_causal=False``, `LinearAttention` and `TaylorAttention` attend in both directions, or to a
context (cross attention)::

    y = mixer(x, context=context, context_mask=context_mask)
    state = mixer.encode_context(context)      # once
    y = mixer(x, state=state)                  # with many x

`ChannelFirst` applies any of them to images and video.
"""

from ..ops.state import ElitaState, KeyValueState
from .channel_first import ChannelFirst
from .decay import FixedDecay, GatedDecay, Mamba2Decay
from .elita import ElitaAttention
from .elita_feed_forward import ElitaFeedForward
from .feature_maps import HedgehogFeatureMap, RebasedFeatureMap
from .gated_attention import GatedAttentionUnit
from .kernel_attention import KernelAttentionState
from .linear import LinearAttention
from .mixed_chunk import MixedChunkAttention, MixedChunkAttentionState
from .norms import ScaleNorm
from .offset_scale import OffsetScale
from .position_logits import SinusoidalLogits
from .quantized import QuantizedEmbedding, QuantizedLinear
from .relative_bias import T5RelativePositionBias
from .rotary import RotaryEmbedding
from .short_convolution import ConvolutionState, GatedShortConvolution, ShortConvolution
from .sinusoidal import ScaledSinusoidalEmbedding
from .sliding_window import SlidingWindowAttention
from .softmax import SoftmaxAttention
from .taylor import TaylorAttention
from .token_shift import token_shift

__all__ = [
    "ChannelFirst",
    "ConvolutionState",
    "ElitaAttention",
    "ElitaFeedForward",
    "ElitaState",
    "FixedDecay",
    "GatedAttentionUnit",
    "GatedDecay",
    "GatedShortConvolution",
    "HedgehogFeatureMap",
    "KernelAttentionState",
    "KeyValueState",
    "LinearAttention",
    "Mamba2Decay",
    "MixedChunkAttention",
    "MixedChunkAttentionState",
    "OffsetScale",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "RebasedFeatureMap",
    "RotaryEmbedding",
    "ScaleNorm",
    "ScaledSinusoidalEmbedding",
    "ShortConvolution",
    "SinusoidalLogits",
    "SlidingWindowAttention",
    "SoftmaxAttention",
    "T5RelativePositionBias",
    "TaylorAttention",
    "token_shift",
]
