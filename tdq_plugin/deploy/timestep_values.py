"""Everything that depends on the timestep alone, computed once for every row of the table."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Size, Tensor, fx, nn

from tdq_plugin.errors import TraceError
from tdq_plugin.graph.timestep_node import find_timestep_node
from tdq_plugin.graph.timestep_path import Source, sources

__all__ = ["TimestepValues", "boundary_nodes", "tabulate"]


class TimestepValues(nn.Module):
    """The timestep path's outputs as one table, so that a forward needs one gather.

    Args:
        table: Shape `(T, total)`; the values side by side.
        shapes: Shape of each value without its batch dimension.
        dtypes: Dtype of each value; the table has the widest.
    """

    table: Tensor

    def __init__(self, table: Tensor, shapes: list[Size], dtypes: list[torch.dtype]) -> None:
        super().__init__()
        self.register_buffer("table", table)
        self.shapes, self.dtypes = shapes, dtypes
        self.lengths = [shape.numel() for shape in shapes]

    def forward(self, index: Tensor, batch: int) -> list[Tensor]:
        """The values at the rows `index`, shape `(1,)` or `(batch,)`, for a whole batch."""
        rows = self.table.index_select(0, index).expand(batch, -1)
        pieces = zip(rows.split(self.lengths, dim=1), self.shapes, self.dtypes, strict=True)
        values = [(piece.view(batch, *shape), dtype) for piece, shape, dtype in pieces]
        # OpenVINO would see a conversion that changes nothing.
        return [value if value.dtype == dtype else value.to(dtype) for value, dtype in values]


def boundary_nodes(graph: fx.Graph) -> list[fx.Node]:
    """Nodes that depend on the timestep alone and feed a node that does not."""
    depends = sources(graph)
    timesteps = find_timestep_node(graph)
    return [
        node
        for node in graph.nodes
        if depends[node] == Source.TIMESTEP
        and node is not timesteps
        and any(depends[user] != Source.TIMESTEP for user in node.users)
    ]


def tabulate(
    graph_module: fx.GraphModule, boundaries: list[fx.Node], timesteps: Tensor
) -> TimestepValues:
    """Run the timestep path once per timestep, with a batch of one.

    The table is bit-equal to what the graph computes for a single sample; for a larger batch the
    graph's own matrix products may differ from it in the last bit.

    Args:
        graph_module: The graph.
        boundaries: Its `boundary_nodes`.
        timesteps: Float32, shape `(T,)`.

    Raises:
        TraceError: A value has no batch dimension, or needs more of the sample than its batch
            size.
    """
    path = _TimestepPath(graph_module, boundaries)
    pair = path.values(timesteps[[0, -1]])
    for node, value in zip(boundaries, pair, strict=True):
        if not isinstance(value, Tensor) or value.shape[:1] != (2,):
            raise TraceError(
                f"The node {node.name!r} of the timestep path gives no value per sample, so it "
                "cannot be tabulated. Pass cache_timestep_path=False."
            )
    rows = [_side_by_side(path.values(t)) for t in timesteps.split(1)]
    shapes, dtypes = [v.shape[1:] for v in pair], [v.dtype for v in pair]
    return TimestepValues(torch.cat(rows), shapes, dtypes)


def _side_by_side(values: list[Tensor]) -> Tensor:
    return torch.cat([value.reshape(1, -1) for value in values], dim=1)


class _TimestepPath:
    """The part of a graph between the timestep and the boundary nodes."""

    def __init__(self, graph_module: fx.GraphModule, boundaries: list[fx.Node]) -> None:
        self.graph_module = graph_module
        self.boundaries = boundaries
        self.depends = sources(graph_module.graph)
        timesteps = find_timestep_node(graph_module.graph)
        assert timesteps is not None
        self.timesteps = timesteps
        needed = set(self._ancestors(boundaries))
        self.nodes = [node for node in graph_module.graph.nodes if node in needed]

    def values(self, timesteps: Tensor) -> list[Any]:
        # A sample appears here only by its batch size; a vector of that length stands in for it.
        stand_in = torch.empty(len(timesteps), device=timesteps.device)
        interpreter = fx.Interpreter(self.graph_module)
        known = interpreter.env
        for node in self.nodes:
            if node is self.timesteps:
                known[node] = timesteps
            elif self._is_sample(node):
                known[node] = stand_in
            else:
                known[node] = self._run(interpreter, node)
        return [known[node] for node in self.boundaries]

    @staticmethod
    def _run(interpreter: fx.Interpreter, node: fx.Node) -> Any:
        try:
            with torch.no_grad():
                return interpreter.run_node(node)
        except IndexError as error:
            raise TraceError(
                f"The node {node.name!r} of the timestep path needs more of the sample than its "
                "batch size, so it cannot be tabulated. Pass cache_timestep_path=False."
            ) from error

    def _ancestors(self, nodes: list[fx.Node]) -> Iterator[fx.Node]:
        waiting, seen = list(nodes), set(nodes)
        while waiting:
            node = waiting.pop()
            yield node
            if node is self.timesteps or self._is_sample(node):
                continue
            new = [argument for argument in node.all_input_nodes if argument not in seen]
            seen.update(new)
            waiting.extend(new)

    def _is_sample(self, node: fx.Node) -> bool:
        return bool(self.depends[node] & (Source.SAMPLE | Source.CONDITION))
