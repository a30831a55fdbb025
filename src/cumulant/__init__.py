"""Linear-time attention for PyTorch: one API for training, prefill and generation, on CPU and GPU."""

from .ops.dispatch import explain
from .ops.linear import linear_attention
from .ops.state import LinearState, State, load_state, save_state
from .ops.taylor import feature_count, taylor_attention

__version__ = "0.1.0"

__all__ = [
    "LinearState",
    "State",
    "__version__",
    "explain",
    "feature_count",
    "linear_attention",
    "load_state",
    "save_state",
    "taylor_attention",
]
