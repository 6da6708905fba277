"""The values that flow between blocks, for all calibration samples at once."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from tdq_plugin.errors import AdapterError
from tdq_plugin.graph.timestep_node import find_timestep_node
from tdq_plugin.graph.timestep_path import sample_input
from tdq_plugin.reconstruct.blocks import Block, run_block
from tdq_plugin.reconstruct.collect import CalibrationSet

__all__ = ["Stream"]


class Stream:
    """Advances calibration samples through a graph, a block at a time.

    Args:
        model: An attached graph.
        data: The samples, their timesteps and conditions.
        batch_size: Samples in a forward.

    Attributes:
        values: Value of each node that a later block still needs, shape `(N, ...)`.
        timesteps: Shape `(N,)`.
    """

    def __init__(self, model: fx.GraphModule, data: CalibrationSet, batch_size: int = 128) -> None:
        self.model, self.batch_size = model, batch_size
        self.timesteps = data.timesteps
        self._placeholders = _bind(model.graph, data)
        self.values: dict[fx.Node, Tensor] = {}

    def __len__(self) -> int:
        return len(self.timesteps)

    def inputs(self, block: Block, index: Tensor | slice) -> dict[fx.Node, Any]:
        """What `run_block` needs for some of the samples."""
        needed = {node: self.values[node] for node in block.inputs} | self._placeholders
        return {node: value[index] for node, value in needed.items()}

    @torch.no_grad()
    def advance(self, block: Block) -> None:
        """Run a block on all samples and keep its outputs.

        Raises:
            AdapterError: A later block reads a value with several rows for each sample.
        """
        parts: dict[fx.Node, list[Tensor]] = {node: [] for node in block.outputs}
        for start in range(0, len(self), self.batch_size):
            batch = self.inputs(block, slice(start, start + self.batch_size))
            for node, value in run_block(self.model, block, batch).items():
                parts[node].append(value)
        for node, pieces in parts.items():
            self.values[node] = torch.cat(pieces)
            if len(self.values[node]) != len(self):
                raise AdapterError(
                    f"The block {block.name!r} hands {node.name!r} over, which has "
                    f"{len(self.values[node])} rows for {len(self)} samples, as the heads of an "
                    "attention. Use granularity='network'."
                )

    def forget(self, later: Sequence[Block]) -> None:
        """Drop the values that no later block needs."""
        needed = {node for block in later for node in block.inputs}
        self.values = {node: value for node, value in self.values.items() if node in needed}


def _bind(graph: fx.Graph, data: CalibrationSet) -> dict[fx.Node, Tensor]:
    normalised = find_timestep_node(graph)
    timestep = normalised.args[0] if normalised is not None else None
    placeholders = graph.find_nodes(op="placeholder")
    sample = sample_input(graph)
    bound = {} if sample is None else {sample: data.samples}
    if isinstance(timestep, fx.Node):
        bound[timestep] = data.timesteps
    conditions = {str(node.target): node for node in placeholders if node not in bound}
    if conditions.keys() != data.conditions.keys():
        raise AdapterError(
            f"Besides the sample and the timestep this graph has the inputs {list(conditions)}, "
            f"and the calibration data have the conditions {list(data.conditions)}. Give exactly "
            "these inputs: CalibrationSet(samples, timesteps, conditions={...})."
        )
    return bound | {node: data.conditions[name] for name, node in conditions.items()}
