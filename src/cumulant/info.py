"""`cumulant info` and `--version`, which need no more than torch."""

from __future__ import annotations

import json
import platform
import warnings
from importlib import metadata

from . import __version__


def show_version() -> None:
    print(f"cumulant {__version__}")


def facts() -> dict[str, str]:
    """Versions, devices, and the implementations that work here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns if NumPy is missing, which is not needed
        import torch

    from .kernels.native.library import instruction_set_name, missing_reason

    obstacle = missing_reason()
    return {
        "cumulant": __version__,
        "python": platform.python_version(),
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads",
        "transformers": _version("transformers"),
        "CUDA device": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "impl reference": "works: quadratic, for checking",
        "impl torch": "works: chunk-parallel PyTorch, any device",
        "impl native": (
            f"does not work here: {obstacle}"
            if obstacle
            else f"works: C++ on the CPU, {instruction_set_name()}"
        ),
        "impl triton": _triton(),
    }


def _triton() -> str:
    import torch

    from .kernels.triton import device

    if reason := device.missing_reason():
        return f"does not work here: {reason}"
    if torch.cuda.is_available():
        return f"Triton {device.triton_version()}; tried in its interpreter alone, on no GPU yet"
    return f"needs a GPU, and there is none; Triton {device.triton_version()} is installed"


def show_info(*, as_json: bool = False) -> None:
    found = facts()
    if as_json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        print(f"{name:<16}{value}")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return (
            "not installed: the language model and the commands need pip install 'cumulant[text]'"
        )
