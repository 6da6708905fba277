"""A torch module as an `ov.Model`, by way of TorchScript."""

import warnings
from collections.abc import Mapping

import openvino as ov
import torch
from torch import Tensor, nn

from tdq_plugin.errors import TDQError, TraceError

__all__ = ["traced_model"]


def traced_model(module: nn.Module, inputs: Mapping[str, Tensor]) -> ov.Model:
    """Trace a module and convert it; sizes other than the batch become those of the example.

    Args:
        module: Operations of torch only; returns a tensor.
        inputs: One call, by the names of forward's arguments.

    Returns:
        A model whose inputs have these names and a dynamic dimension 0.

    Raises:
        TraceError: The module gives something else than one tensor.
    """
    with torch.no_grad(), warnings.catch_warnings():
        # OpenVINO reads TorchScript: torch.export does not know torch's fake quantization.
        warnings.filterwarnings("ignore", ".*torch.jit.trace", DeprecationWarning)
        # The tracer warns of each size that becomes a constant.
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
        try:
            traced = torch.jit.trace(module, example_kwarg_inputs=dict(inputs), check_trace=False)
        except TDQError:
            raise
        except RuntimeError as error:
            raise TraceError(
                f"This {type(module).__name__} cannot be traced for OpenVINO: {error}. Its inputs "
                "and outputs must be tensors."
            ) from error
        model = ov.convert_model(traced)
    if len(model.outputs) != 1:
        raise TraceError(
            f"This {type(module).__name__} returns {len(model.outputs)} tensors, and a converted "
            "model has one output. Quantize a model whose forward returns the prediction alone."
        )
    for parameter in model.get_parameters():
        (name,) = parameter.output(0).get_names() & set(inputs)
        parameter.set_friendly_name(name)
        parameter.output(0).get_tensor().set_names({name})
        parameter.set_partial_shape(ov.PartialShape([-1, *inputs[name].shape[1:]]))
    model.validate_nodes_and_infer_types()
    return model
