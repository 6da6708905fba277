"""What every export has in common: a copy of the model whose inputs are tensors."""

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from brevitas.export.manager import BaseManager
from brevitas.proxy.quant_proxy import QuantProxyFromInjector
from torch import Tensor, nn

from tdq_plugin.adapters.brevitas.export.lookup import LookupBank, exported_table
from tdq_plugin.errors import AdapterError
from tdq_plugin.float32 import require_float32
from tdq_plugin.model_output import first_tensor

__all__ = ["ExampleInputs", "ExportedModel", "check_quantizers"]

ExampleInputs = tuple[Any, ...] | Mapping[str, Any]


class ExportedModel(nn.Module):
    """A copy of a frozen model that looks its scales up within the graph.

    Brevitas calls `forward` of what it exports, past the hooks that lead the scales; here it calls
    the model itself. If an export fails, the user's model is as before.

    Args:
        model: The frozen model.
        example_inputs: Arguments of the model; tensors and numbers become inputs, what else there
            is stays as it is.

    Attributes:
        inputs: The inputs by the names of the arguments; numbers as tensors.
        table: The scales.

    Raises:
        AdapterError: The model is not attached, not frozen, not in evaluation mode or not float32.
        LookupRuleError: The example's timestep is not in the table.
    """

    def __init__(self, model: nn.Module, example_inputs: ExampleInputs) -> None:
        super().__init__()
        self.table = exported_table(model)
        _check_state(model)
        signature = inspect.signature(model.forward)
        self._bound = _bind(signature, example_inputs)
        # The name of `**arguments`, whose entries are inputs, too.
        kinds = {parameter.kind: name for name, parameter in signature.parameters.items()}
        self._further = kinds.get(inspect.Parameter.VAR_KEYWORD, "")
        # The model can raise where a graph cannot: for a wrong shape, or an unknown timestep.
        with torch.no_grad():
            model(*self._bound.args, **self._bound.kwargs)
        self.model = copy.deepcopy(model)
        self.model.scale_bank = LookupBank(self.table)
        arguments = self._bound.arguments
        self.inputs = {
            name: value if isinstance(value, Tensor) else torch.tensor(value)
            for name, value in {**arguments, **arguments.get(self._further, {})}.items()
            if isinstance(value, Tensor | int | float) and not isinstance(value, bool)
        }

    def forward(self, *inputs: Tensor) -> Tensor:
        """What the model predicts: its output, or the first of several."""
        given = dict(zip(self.inputs, inputs, strict=True))
        arguments = {name: given.get(name, old) for name, old in self._bound.arguments.items()}
        if self._further in arguments:
            further = arguments[self._further].items()
            arguments[self._further] = {name: given.get(name, old) for name, old in further}
        bound = inspect.BoundArguments(self._bound.signature, arguments)
        return first_tensor(self.model(*bound.args, **bound.kwargs))


def check_quantizers(model: nn.Module, manager: type[BaseManager]) -> None:
    """Look for quantizers that an export would leave out or take in another form.

    Raises:
        AdapterError: There is one. Brevitas would warn, and fail on None later; or it would export
            what runs in its inference mode.
    """
    for path, proxy in model.named_modules():
        if not isinstance(proxy, QuantProxyFromInjector) or not proxy.is_quant_enabled:
            continue
        if proxy.export_mode:
            raise AdapterError("The model is in quant_inference_mode. Export it after that block.")
        if manager.handler_from_module(proxy, no_inheritance=True) is None:
            raise AdapterError(
                f"{path.removeprefix('model.')!r} is quantized by a {type(proxy).__name__}, which "
                f"exports to {manager.target_name} do not know. Use an integer quantizer of "
                "Brevitas there, or none."
            )


def _bind(signature: inspect.Signature, inputs: ExampleInputs) -> inspect.BoundArguments:
    if isinstance(inputs, Mapping):
        return signature.bind(**inputs)
    return signature.bind(*inputs)


def _check_state(model: nn.Module) -> None:
    if model.training:
        raise AdapterError("The model is in training mode. Call model.eval() before the export.")
    require_float32(model, "exported model")
