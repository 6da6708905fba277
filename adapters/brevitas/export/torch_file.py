"""Frozen models as TorchScript: torch's operators that quantize and dequantize."""

import warnings
from pathlib import Path

import torch
from brevitas.export import TorchQCDQManager
from torch import nn

from tdq_plugin.adapters.brevitas.export.handlers import TorchQCDQHandler
from tdq_plugin.adapters.brevitas.export.prepare import (
    ExampleInputs,
    ExportedModel,
    check_quantizers,
)
from tdq_plugin.files import atomic_file

__all__ = ["export_torch"]


class _TorchQCDQ(TorchQCDQManager):
    handlers = (TorchQCDQHandler, *TorchQCDQManager.handlers)


def export_torch(
    model: nn.Module, example_inputs: ExampleInputs, path: str | Path | None = None
) -> torch.jit.ScriptModule:
    """Trace a frozen model, with its scale table, to TorchScript.

    As with `export_onnx`, the graph finds the scales by the value of t, takes one timestep for
    the batch or one for each sample, as the example does, and gives NaN for a t that is not in
    the table. Codes are bit-equal to the model's.

    Args:
        model: The frozen model, in evaluation mode; it stays as it is.
        example_inputs: As for `export_onnx`. The result takes tensors, in this order.
        path: A file for it, written atomically.

    Returns:
        The traced model.

    Raises:
        AdapterError: The model is not attached, not frozen, in training mode or not float32, or
            a quantizer of it is not known to the format.
        LookupRuleError: The example's timestep is not in the table.
    """
    exported = ExportedModel(model, example_inputs)
    check_quantizers(exported, _TorchQCDQ)
    with warnings.catch_warnings():
        # What the tracer takes for constant are sizes of the example, and checks.
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
        # It is what Brevitas exports to.
        warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
        traced: torch.jit.ScriptModule = _TorchQCDQ.export(
            exported, tuple(exported.inputs.values())
        )
    if path is not None:
        with atomic_file(path) as temporary:
            traced.save(str(temporary))
    return traced
