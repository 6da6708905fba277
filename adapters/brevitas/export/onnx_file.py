"""Frozen models as ONNX files: QuantizeLinear and DequantizeLinear, or QONNX."""

import json
from pathlib import Path
from typing import Any, Literal

import onnx
from brevitas.export import QONNXManager, StdQCDQONNXManager
from torch import nn

from tdq_plugin.adapters.brevitas.export.handlers import OnnxQCDQHandler, QONNXHandler
from tdq_plugin.adapters.brevitas.export.prepare import (
    ExampleInputs,
    ExportedModel,
    check_quantizers,
)
from tdq_plugin.files import atomic_file
from tdq_plugin.options import check_option

__all__ = ["OnnxFormat", "export_onnx"]

OnnxFormat = Literal["qcdq", "qonnx"]


# torch adds an Identity for each constant that is equal to another one.
_PASSES = ("eliminate_identity",)


class _QCDQ(StdQCDQONNXManager):
    handlers = (OnnxQCDQHandler, *StdQCDQONNXManager.handlers)
    onnx_passes = (*_PASSES, *StdQCDQONNXManager.onnx_passes)


class _QONNX(QONNXManager):
    handlers = (QONNXHandler, *QONNXManager.handlers)
    onnx_passes = (*_PASSES, *QONNXManager.onnx_passes)


_MANAGERS: dict[str, Any] = {"qcdq": _QCDQ, "qonnx": _QONNX}


def export_onnx(
    model: nn.Module,
    path: str | Path,
    example_inputs: ExampleInputs,
    format: OnnxFormat = "qcdq",
    dynamic_batch: bool = True,
    opset: int = 17,
) -> None:
    """Write a frozen model, with its scale table and a timestep among its inputs.

    The graph finds the scales by the value of t, and takes what the scheduler gives. A t that is
    not in the table makes the output NaN. The metadata entry `tdq_timesteps` lists the table's.

    With one timestep for each sample, onnxruntime rounds the inputs of linear layers once more,
    unless its session has the entry `session.qdq_matmulnbits_accuracy_level` = `1`.

    Args:
        model: The frozen model, in evaluation mode; it stays as it is.
        path: The file, written atomically.
        example_inputs: Arguments of the model, as a tuple or a dictionary. Tensors and numbers
            become inputs of the graph by the names that they have in forward. A timestep of shape
            `(B,)`, B > 1, gives a graph with one timestep for each sample, any other one with one
            for the whole batch.
        format: `qcdq`: ONNX' own operators, int8 weights. `qonnx`: the operator Quant of QONNX,
            float weights.
        dynamic_batch: The inputs that are as long as the sample may have any length.
        opset: Version of the operators.

    Raises:
        AdapterError: The model is not attached, not frozen, in training mode or not float32, or
            a quantizer of it is not known to the format.
        LookupRuleError: The example's timestep is not in the table.
        ConfigError: There is no such format.
    """
    check_option("format", format, _MANAGERS)
    exported = ExportedModel(model, example_inputs)
    check_quantizers(exported, _MANAGERS[format])
    with atomic_file(path) as temporary:
        # Brevitas' choice for torch's newer exporter would quantize the weights at run time.
        _MANAGERS[format].export(
            exported,
            args=tuple(exported.inputs.values()),
            export_path=str(temporary),
            dynamo=False,
            opset_version=opset,
            input_names=list(exported.inputs),
            output_names=["output"],
            dynamic_axes=_dynamic_axes(exported) if dynamic_batch else None,
            keep_initializers_as_inputs=False,
        )
        graph = onnx.load(temporary)
        timesteps = exported.table.timesteps.tolist()
        onnx.helper.set_model_props(graph, {"tdq_timesteps": json.dumps(timesteps)})
        onnx.checker.check_model(graph)
        onnx.save(graph, temporary)


def _dynamic_axes(exported: ExportedModel) -> dict[str, dict[int, str]]:
    inputs = exported.inputs
    batch = next((len(value) for value in inputs.values() if value.dim() > 1), None)
    # A 1-d input with one element is a timestep for the whole batch.
    batched = [
        name
        for name, value in inputs.items()
        if value.dim() > 0 and len(value) == batch and value.shape != (1,)
    ]
    return {name: {0: "batch"} for name in (*batched, "output")}
