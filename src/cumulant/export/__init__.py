"""Language models for other programs: ONNX graphs, and programs of `torch.export`."""

from .onnx import export_onnx

__all__ = ["export_onnx"]
