"""How a scale bank is attached to a graph that torch.ao's FX mode prepared."""

import copy
from collections import Counter
from typing import cast

from torch import fx, nn

from tdq_plugin.adapters.torch_ao.fake_quantize import TDQFakeQuantize, initialise_weights
from tdq_plugin.errors import AdapterError
from tdq_plugin.graph.compute import (
    is_layer,
    normalise_calls,
    operand_indices,
    quantizer_nodes,
)
from tdq_plugin.graph.scale_edge import connect_scales
from tdq_plugin.graph.timestep_node import find_timestep_node, insert_timestep_node
from tdq_plugin.graph.timestep_path import sees_samples, sources
from tdq_plugin.quantizer import ActivationQuantizer
from tdq_plugin.quantizer_names import name_quantizers
from tdq_plugin.registry import register_adapter
from tdq_plugin.timestep import find_timestep_argument

__all__ = ["TorchAOAdapter"]


@register_adapter("torch_ao")
class TorchAOAdapter:
    """Graphs from `prepare_qat_fx` and `prepare_fx` with `TDQFakeQuantize` in the qconfig."""

    @staticmethod
    def covers(model: nn.Module) -> bool:
        return isinstance(model, fx.GraphModule) and any(
            isinstance(module, TDQFakeQuantize) for module in model.modules()
        )

    @staticmethod
    def quantizers(model: nn.Module) -> dict[str, ActivationQuantizer]:
        graph_module = _as_graph_module(model)
        normalise_calls(graph_module.graph)
        _separate(graph_module)
        _strip(graph_module)
        initialise_weights(graph_module)
        nodes = _name(graph_module.graph)
        return {name: _module(graph_module, node) for name, node in nodes.items()}

    @staticmethod
    def connect(model: nn.Module, timestep_argument: str | None) -> None:
        graph_module = _as_graph_module(model)
        if find_timestep_node(graph_module.graph) is None:
            names = [str(n.target) for n in graph_module.graph.find_nodes(op="placeholder")]
            timestep = find_timestep_argument(graph_module.forward, timestep_argument)
            sample = next((name for name in names if name != timestep), None)
            insert_timestep_node(graph_module.graph, timestep, sample)
        connect_scales(graph_module, list(_name(graph_module.graph).values()))


def _separate(graph_module: fx.GraphModule) -> None:
    """Give each quantized value a quantizer of its own; torch.ao lets some share an observer."""
    used: Counter[str] = Counter()
    for node in quantizer_nodes(graph_module.graph):
        path = str(node.target)
        used[path] += 1
        if used[path] > 1:
            node.target = f"{path}_{used[path] - 1}"
            twin = copy.deepcopy(_module_at(graph_module, path))
            graph_module.add_submodule(node.target, twin)


def _strip(graph_module: fx.GraphModule) -> None:
    """Keep the quantizers of compute layers' inputs; torch.ao also observes outputs and more."""
    graph = graph_module.graph
    depends = sources(graph)
    for node in quantizer_nodes(graph):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        on_path = sees_samples(depends[node])
        for user in list(node.users):
            operands = {user.args[index] for index in operand_indices(user)}
            wanted = _wanted(graph_module, user) if node in operands and on_path else None
            if wanted is None:
                user.replace_input_with(node, source)
            elif wanted.grid != _module(graph_module, node).grid:
                user.replace_input_with(node, _with_grid(graph_module, node, wanted))
        if not node.users:
            graph.erase_node(node)
    graph_module.delete_all_unused_submodules()
    graph_module.recompile()


def _wanted(graph_module: fx.GraphModule, user: fx.Node) -> TDQFakeQuantize | None:
    """A new quantizer as the qconfig of a compute node asks for, None where it stays float.

    torch.ao lets a layer's output observer serve the next layer's input, whatever the qconfig of
    the next layer says.
    """
    observed = graph_module.meta["_observed_graph_module_attrs"]
    qconfig = observed.node_name_to_qconfig.get(user.name)
    quantizer = qconfig.activation() if qconfig is not None else None
    return quantizer if isinstance(quantizer, TDQFakeQuantize) else None


def _with_grid(graph_module: fx.GraphModule, node: fx.Node, quantizer: TDQFakeQuantize) -> fx.Node:
    """The quantizer of the same value on another grid; made where there is none yet."""
    grid = quantizer.grid
    path = f"{node.target}_{'signed' if grid.signed else 'unsigned'}{grid.bits}"
    known = graph_module.graph.find_nodes(op="call_module", target=path)
    if known:
        return cast(fx.Node, known[0])
    graph_module.add_submodule(path, quantizer.train(graph_module.training))
    with graph_module.graph.inserting_after(node):
        return graph_module.graph.call_module(path, (node.args[0],))


def _name(graph: fx.Graph) -> dict[str, fx.Node]:
    """The quantizers in order of execution, by name."""
    nodes = quantizer_nodes(graph)
    names = name_quantizers((_layer(node), _operands(node, nodes)) for node in graph.nodes)
    return {names[node]: node for node in nodes}


def _layer(node: fx.Node) -> str | None:
    return str(node.target) if is_layer(node) else None


def _operands(node: fx.Node, quantizers: list[fx.Node]) -> dict[int, fx.Node]:
    operands = {index: node.args[index] for index in operand_indices(node)}
    return {k: cast(fx.Node, operand) for k, operand in operands.items() if operand in quantizers}


def _module(graph_module: fx.GraphModule, node: fx.Node) -> TDQFakeQuantize:
    return _module_at(graph_module, str(node.target))


def _module_at(graph_module: fx.GraphModule, path: str) -> TDQFakeQuantize:
    module = graph_module.get_submodule(path)
    assert isinstance(module, TDQFakeQuantize)
    return module


def _as_graph_module(model: nn.Module) -> fx.GraphModule:
    if not isinstance(model, fx.GraphModule):
        raise AdapterError(
            f"Expected a GraphModule from prepare_qat_fx, not {type(model).__name__}."
        )
    return model
