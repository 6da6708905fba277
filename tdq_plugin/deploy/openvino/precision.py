"""Which layers OpenVINO executes on integers, read from the compiled model."""

from collections.abc import Mapping
from typing import Any

import openvino as ov

from tdq_plugin.deploy.openvino.nodes import CONVOLUTIONS, layer_name

__all__ = ["DEFAULT_PROPERTIES", "integer_layers"]

DEFAULT_PROPERTIES = {"INFERENCE_PRECISION_HINT": "f32"}
"""Without the hint, CPUs with bfloat16 compute in it, and scales are wrong by up to 0.4 %."""

_LAYERS = (*CONVOLUTIONS, "MatMul")
_KERNELS = ("Convolution", "Deconvolution", "FullyConnected", "MatMul")


def integer_layers(model: ov.Model, properties: Mapping[str, Any]) -> set[str]:
    """Names of the convolutions and matrix products that run on int8 kernels on this machine.

    Args:
        model: An uncompiled model; it stays as it is.
        properties: OpenVINO's properties.
    """
    names = {
        node.get_friendly_name(): layer_name(node)
        for node in model.get_ops()
        if node.get_type_name() in _LAYERS
    }
    compiled = ov.Core().compile_model(model, "CPU", dict(properties))
    found = set()
    for node in compiled.get_runtime_model().get_ops():
        facts = {key: value.astype(str) for key, value in node.get_rt_info().items()}
        if _is_integer_kernel(facts):
            for original in facts["originalLayersNames"].split(","):
                # Some products are known by their dequantization only.
                original = original.partition("/Dequantization")[0]
                found |= {names[original]} if original in names else set()
    return found


def _is_integer_kernel(facts: Mapping[str, str]) -> bool:
    # A float product with int8 weights reports the precision i8, too; its kernel is a float one.
    return (
        facts["layerType"] in _KERNELS
        and facts["runtimePrecision"] in ("i8", "u8")
        and facts["primitiveType"].lower().endswith("i8")
    )
