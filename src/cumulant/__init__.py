"""Linear-time attention for PyTorch: one API for training, prefill and generation, on CPU and GPU."""

from .ops.dispatch import explain
from .ops.elita import elita_attention
from .ops.gated import gated_attention
from .ops.linear import linear_attention
from .ops.mixed_chunk import mixed_chunk_attention
from .ops.state import ElitaState, KeyValueState, LinearState, MixedChunkState, State, load_state, save_state
from .ops.taylor import feature_count, taylor_attention

__version__ = "0.1.0"

__all__ = [
    "ElitaState",
    "KeyValueState",
    "LinearState",
    "MixedChunkState",
    "State",
    "__version__",
    "elita_attention",
    "explain",
    "feature_count",
    "gated_attention",
    "linear_attention",
    "load_state",
    "mixed_chunk_attention",
    "save_state",
    "taylor_attention",
]
