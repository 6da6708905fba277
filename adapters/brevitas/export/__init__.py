"""Exports of frozen Brevitas models: scales are looked up by the timestep inside the graph."""

from tdq_plugin.adapters.brevitas.export.onnx_file import OnnxFormat, export_onnx
from tdq_plugin.adapters.brevitas.export.torch_file import export_torch

__all__ = ["OnnxFormat", "export_onnx", "export_torch"]
