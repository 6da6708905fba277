"""A converted model that is called like the torch model, with any batch size and timestep."""

from collections.abc import Mapping
from typing import Any

import numpy.typing as npt
import openvino as ov
import torch
from torch import Tensor

from tdq_plugin.deploy.openvino.nodes import sizes
from tdq_plugin.deploy.openvino.precision import DEFAULT_PROPERTIES
from tdq_plugin.deploy.openvino.report import ConversionReport
from tdq_plugin.errors import AdapterError, TimestepError
from tdq_plugin.scales.frozen import FrozenBank
from tdq_plugin.timestep import as_timesteps

__all__ = ["OpenVINOModel"]

# A model is compiled for each batch size: with a dynamic one it takes 1.2 to 1.4 times as long.
_REMEMBERED_SHAPES = 4

_Shapes = tuple[tuple[int, ...], ...]


class OpenVINOModel:
    """One model for all timesteps of a table, on OpenVINO's CPU kernels.

    The first call with a batch size compiles the model for it, which takes seconds.

    Args:
        model: Inputs with a dynamic batch, the timestep of shape `(N,)`, one output.
        bank: The table whose rows the model holds.
        timestep_input: Name of the input that takes the timestep.
        mixed_timesteps: Whether each sample of a batch may have a timestep of its own.
        report: What conversion did.
        properties: Properties for OpenVINO's CPU plugin, such as `INFERENCE_NUM_THREADS`; the
            precision hint is `f32` unless they say otherwise.
    """

    def __init__(
        self,
        model: ov.Model,
        bank: FrozenBank,
        timestep_input: str,
        mixed_timesteps: bool,
        report: ConversionReport,
        properties: Mapping[str, Any] | None = None,
    ) -> None:
        self.model, self.bank, self.report = model, bank, report
        self.timestep_input, self.mixed_timesteps = timestep_input, mixed_timesteps
        self.properties = {**DEFAULT_PROPERTIES, **(properties or {})}
        self._compiled: dict[_Shapes, ov.CompiledModel] = {}

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the inputs, in the order of the torch model's arguments."""
        return tuple(node.get_friendly_name() for node in self.model.get_parameters())

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run the model.

        Args:
            *args: The torch model's arguments: tensors, and the timestep as a number or a tensor
                of shape `()`, `(1,)` or `(B,)`.
            **kwargs: Arguments by name.

        Returns:
            The output, float32, on the CPU.

        Raises:
            AdapterError: An argument is missing, unknown, given twice, or of another shape than at
                conversion.
            LookupRuleError: A timestep is not in the table.
            TimestepError: The number of timesteps is neither 1 nor the batch size, or they differ
                and the model takes one a call.
        """
        given = self._bind(args, kwargs)
        timesteps = as_timesteps(given[self.timestep_input], "cpu")
        tensors = {n: torch.as_tensor(v) for n, v in given.items() if n != self.timestep_input}
        self._check_shapes(tensors)
        batch = next(iter(tensors.values())).shape[0]
        tensors[self.timestep_input] = self._check_timesteps(timesteps, batch)
        arrays = {
            node.get_friendly_name(): _array(tensors[node.get_friendly_name()]).astype(
                node.get_element_type().to_dtype(), copy=False
            )
            for node in self.model.get_parameters()
        }
        compiled = self._compiled_for(tuple(array.shape for array in arrays.values()))
        return torch.from_numpy(compiled(list(arrays.values()))[0])

    def _bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        names = self.input_names
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        if len(args) + len(kwargs) != len(names) or set(given) != set(names):
            raise AdapterError(
                f"The converted model takes {list(names)}; it was called with {len(args)} "
                f"arguments by position and {list(kwargs)} by name."
            )
        return given

    def _check_shapes(self, tensors: Mapping[str, Tensor]) -> None:
        for node in self.model.get_parameters():
            name, expected = node.get_friendly_name(), sizes(node.output(0))
            if name != self.timestep_input and list(tensors[name].shape[1:]) != expected[1:]:
                wanted = ", ".join(["B", *map(str, expected[1:])])
                raise AdapterError(
                    f"The converted model takes {name!r} of shape ({wanted}), not "
                    f"{tuple(tensors[name].shape)}. Convert it with an example of that size."
                )

    def _check_timesteps(self, timesteps: Tensor, batch: int) -> Tensor:
        self.bank.index(timesteps)
        if len(timesteps) not in (1, batch):
            raise TimestepError(
                f"{len(timesteps)} timesteps were given for {batch} samples. "
                "Give one timestep, or one per sample."
            )
        if bool((timesteps == timesteps[0]).all()):
            return timesteps[:1]
        if not self.mixed_timesteps:
            raise TimestepError(
                f"This model takes one timestep a call, not {timesteps.tolist()[:5]}. Call it once "
                "for each timestep."
            )
        return timesteps

    def _compiled_for(self, shapes: _Shapes) -> ov.CompiledModel:
        if shapes not in self._compiled:
            if len(self._compiled) == _REMEMBERED_SHAPES:
                del self._compiled[next(iter(self._compiled))]
            model = self.model.clone()
            model.reshape(dict(enumerate(map(ov.PartialShape, shapes))))
            self._compiled[shapes] = ov.Core().compile_model(model, "CPU", self.properties)
        # The sizes stand in the order of their last use.
        self._compiled[shapes] = self._compiled.pop(shapes)
        return self._compiled[shapes]


def _array(tensor: Tensor) -> npt.NDArray[Any]:
    # numpy has no bfloat16.
    tensor = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
    array: npt.NDArray[Any] = tensor.detach().cpu().numpy()
    return array
