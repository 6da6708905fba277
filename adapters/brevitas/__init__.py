"""Brevitas: TDQ quantizer classes for its layers, layer maps and configurations."""

from tdq_plugin.adapters.brevitas.adapter import BrevitasAdapter
from tdq_plugin.adapters.brevitas.examples import register_with_brevitas_examples
from tdq_plugin.adapters.brevitas.export import export_onnx, export_torch
from tdq_plugin.adapters.brevitas.inference import TDQInferenceHandler
from tdq_plugin.adapters.brevitas.layer_map import tdq_layer_map
from tdq_plugin.adapters.brevitas.proxy import TDQActQuantProxy
from tdq_plugin.adapters.brevitas.quantize import quantize_layerwise, timestep_path_names
from tdq_plugin.adapters.brevitas.quantizers import (
    TDQInt8ActPerTensorFloat,
    TDQShiftedUint8ActPerTensorFloat,
    TDQUint8ActPerTensorFloat,
)

__all__ = [
    "BrevitasAdapter",
    "TDQActQuantProxy",
    "TDQInferenceHandler",
    "TDQInt8ActPerTensorFloat",
    "TDQShiftedUint8ActPerTensorFloat",
    "TDQUint8ActPerTensorFloat",
    "export_onnx",
    "export_torch",
    "quantize_layerwise",
    "register_with_brevitas_examples",
    "tdq_layer_map",
    "timestep_path_names",
]
