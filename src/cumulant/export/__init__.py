"""Language models for other programs: ONNX graphs, and programs of `torch.export`."""

from .folder import export_onnx
from .program import StatefulModel, export_program
from .runtime import OnnxModel

__all__ = ["OnnxModel", "StatefulModel", "export_onnx", "export_program"]
