"""Weights from other packages, loaded into our modules, which give the same numbers.

`docs/migrating.md` has an example of each.
"""

from .elita import from_elita
from .fast_transformers import from_fast_transformers
from .flash_pytorch import from_flash_pytorch
from .mamba2 import Mamba2Mixer, from_mamba2
from .simple_gla import SimpleGatedLinearAttention, from_simple_gla
from .state_space import from_ssm_state, ssd, to_ssm_state
from .taylor_series import from_taylor_series

__all__ = [
    "Mamba2Mixer",
    "SimpleGatedLinearAttention",
    "from_elita",
    "from_fast_transformers",
    "from_flash_pytorch",
    "from_mamba2",
    "from_simple_gla",
    "from_ssm_state",
    "from_taylor_series",
    "ssd",
    "to_ssm_state",
]
