"""The pass that computes once, for every row of the table, what depends on the timestep alone."""

from enum import Flag, auto
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import openvino as ov
from openvino import opset13 as ops

from tdq_plugin.deploy.openvino.nodes import consumers
from tdq_plugin.deploy.openvino.precision import DEFAULT_PROPERTIES

__all__ = ["tabulate_timestep_path"]

_Array = npt.NDArray[np.float32]

# What takes a value of one sample as well as one of the whole batch.
_BROADCASTING = {"Add", "Divide", "Multiply", "Subtract"}


class _Source(Flag):
    """What a node's value depends on; a shape counts as nothing."""

    NOTHING = 0
    TIMESTEP = auto()
    OTHERS = auto()


class _Value(NamedTuple):
    """A value that depends on the timestep alone, and the inputs that read it where others join."""

    output: ov.Output
    readers: list[ov.Input]


def tabulate_timestep_path(
    model: ov.Model, timestep_input: str, timesteps: _Array, mixed_timesteps: bool
) -> None:
    """Replace the time embedding and all that follows from it by one gather; in place.

    A value is left as it is if it is not a number or row for each sample, or if it is read by an
    operation that does not broadcast.

    Args:
        model: Inputs with a dynamic batch, and the timestep of shape `(N,)`.
        timestep_input: Name of the timestep's parameter.
        timesteps: All timesteps that the model will be called with, ascending, shape `(T,)`.
        mixed_timesteps: Whether a batch may hold several timesteps; else the first one counts.
    """
    (timestep,) = (p for p in model.get_parameters() if p.get_friendly_name() == timestep_input)
    batch = 2 if mixed_timesteps else 1
    found = _boundary(model, timestep)
    columns = _evaluate(model, timestep, [value.output for value in found], timesteps, batch)
    kept = [
        (value, column)
        for value, column in zip(found, columns, strict=True)
        if column.ndim == 1 or column.shape[1] == batch
    ]
    if not kept:
        return
    # Where there are rows for each sample, the first sample's stands for all.
    values = [c.reshape(len(c), 1) if c.ndim == 1 else c[:, 0].reshape(len(c), -1) for _, c in kept]
    table = ops.constant(np.concatenate(values, axis=1))
    row = ops.gather(table, _index(timestep, timesteps, mixed_timesteps), _integers(0))
    lengths = _integers([value.shape[1] for value in values])
    pieces = ops.variadic_split(row, _integers(1), lengths).outputs()
    for (value, column), piece in zip(kept, pieces, strict=True):
        shape = _integers([-1, *column.shape[2:]] if column.ndim > 1 else [])
        shaped = ops.reshape(piece, shape, special_zero=False)
        for reader in value.readers:
            reader.replace_source_output(shaped.output(0))
    model.validate_nodes_and_infer_types()


def _boundary(model: ov.Model, timestep: ov.Node) -> list[_Value]:
    depends: dict[str, _Source] = {}
    for node in model.get_ordered_ops():
        source = _Source.NOTHING
        if node.get_type_name() == "Parameter":
            is_timestep = node.get_name() == timestep.get_name()
            source = _Source.TIMESTEP if is_timestep else _Source.OTHERS
        elif node.get_type_name() != "ShapeOf":
            for value in node.input_values():
                source |= depends[value.get_node().get_name()]
        depends[node.get_name()] = source
    found = []
    for node in model.get_ordered_ops():
        if depends[node.get_name()] == _Source.TIMESTEP and node.get_type_name() != "Parameter":
            for output in node.outputs():
                readers = [
                    reader
                    for reader in consumers(output)
                    if depends[reader.get_node().get_name()] & _Source.OTHERS
                ]
                kinds = {reader.get_node().get_type_name() for reader in readers}
                if readers and kinds <= _BROADCASTING:
                    found.append(_Value(output, readers))
    return found


def _evaluate(
    model: ov.Model,
    timestep: ov.Node,
    outputs: list[ov.Output],
    timesteps: _Array,
    batch: int,
) -> list[_Array]:
    """The outputs' values at all timesteps, stacked along dimension 0."""
    path = ov.Model(outputs, model.get_parameters()).clone()
    path.reshape({i: _with_batch(p, batch) for i, p in enumerate(path.get_parameters())})
    compiled = ov.Core().compile_model(path, "CPU", DEFAULT_PROPERTIES)
    inputs = {
        p.get_friendly_name(): np.zeros(p.shape, p.get_element_type().to_dtype())
        for p in path.get_parameters()
    }
    rows = []
    for value in timesteps:
        inputs[timestep.get_friendly_name()][:] = value
        result = compiled(list(inputs.values()))
        rows.append([result[i] for i in range(len(outputs))])
    return [np.stack(column) for column in zip(*rows, strict=True)]


def _with_batch(parameter: ov.Node, batch: int) -> ov.PartialShape:
    return ov.PartialShape([batch, *list(parameter.partial_shape)[1:]])


def _index(timestep: ov.Node, timesteps: _Array, mixed_timesteps: bool) -> ov.Node:
    """The row whose timestep is the nearest, shape `(N,)` or `(1,)`."""
    middles = ops.constant((timesteps[1:] + timesteps[:-1]) / 2)
    if not mixed_timesteps:
        timestep = ops.gather(timestep, _integers([0]), _integers(0))
    above = ops.greater(ops.unsqueeze(timestep, _integers(1)), middles)
    return ops.reduce_sum(ops.convert(above, ov.Type.i32), _integers(1))


def _integers(values: int | list[int]) -> ov.Node:
    return ops.constant(np.array(values, dtype=np.int64))
