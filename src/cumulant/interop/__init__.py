"""Weights from other packages, loaded into our modules, which give the same numbers.

`docs/migrating.md` has an example of each.
"""

from .elita import from_elita
from .fast_transformers import from_fast_transformers
from .flash_pytorch import from_flash_pytorch
from .taylor_series import from_taylor_series

__all__ = ["from_elita", "from_fast_transformers", "from_flash_pytorch", "from_taylor_series"]
