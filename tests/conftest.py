import logging
import os

import pytest
import torch

from cumulant.kernels.native import library
from cumulant.ops.repeated import forget

from .ops import interpreter  # noqa: F401  (it decides how Triton's kernels run)

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
torch.set_num_threads(1)  # also for fixtures of a module, which come before those of a test


@pytest.fixture(autouse=True)
def _warnings_are_logged():
    """Commands that run in this process turn the libraries' warnings off."""
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    forget()  # calls of tests that changed kernels


@pytest.fixture(params=library.INSTRUCTIONS)
def isa(request, monkeypatch):
    """Each instruction set of the native kernels that this machine has."""
    if not library.loaded_library().cumulant_supports(library.INSTRUCTIONS.index(request.param)):
        pytest.skip(f"this machine has no {request.param}")
    monkeypatch.setattr(library, "instruction_set_name", lambda: request.param)
    return request.param
