"""How a scale bank is attached to a graph that torchao prepared."""

import copy
from collections.abc import Iterable
from types import MethodType
from typing import Any, cast

from torch import fx, nn
from torchao.quantization.pt2e import move_exported_model_to_eval, move_exported_model_to_train

from tdq_plugin.adapters.pt2e.fake_quantize import TDQFakeQuantize, TDQWeightFakeQuantize
from tdq_plugin.adapters.pt2e.operators import is_layer, layer_path, operand_indices
from tdq_plugin.adapters.pt2e.timestep_input import prepare_timestep_input
from tdq_plugin.graph.compute import quantizer_nodes
from tdq_plugin.graph.scale_edge import connect_scales
from tdq_plugin.graph.timestep_path import sees_samples, sources
from tdq_plugin.quantizer import ActivationQuantizer
from tdq_plugin.quantizer_names import name_quantizers
from tdq_plugin.registry import register_adapter
from tdq_plugin.weights import follow_loaded_weight

__all__ = ["PT2EAdapter"]


@register_adapter("pt2e")
class PT2EAdapter:
    """Graphs from `prepare_qat_pt2e` and `prepare_pt2e` with `TDQFakeQuantize`."""

    @staticmethod
    def covers(model: nn.Module) -> bool:
        return isinstance(model, fx.GraphModule) and any(
            isinstance(module, TDQFakeQuantize) for module in model.modules()
        )

    @staticmethod
    def quantizers(model: nn.Module) -> dict[str, ActivationQuantizer]:
        graph_module = cast(fx.GraphModule, model)
        _strip(graph_module)
        _initialise_weights(graph_module)
        nodes = _named_nodes(graph_module)
        _separate(graph_module, nodes.values())
        return {name: _module(graph_module, node) for name, node in nodes.items()}

    @staticmethod
    def connect(model: nn.Module, timestep_argument: str | None) -> None:
        graph_module = cast(fx.GraphModule, model)
        prepare_timestep_input(graph_module, timestep_argument)
        _remember_module_paths(graph_module.graph)
        connect_scales(graph_module, list(_named_nodes(graph_module).values()))
        _switch_modes(graph_module)
        graph_module._register_deepcopy_hook(_switch_modes)


def _remember_module_paths(graph: fx.Graph) -> None:
    """Operators with parameters tell where blocks begin, which reconstruction trains in turn."""
    for node in graph.nodes:
        parameters = [n for n in node.all_input_nodes if n.op == "get_attr"]
        if node.op == "call_function" and is_layer(node):
            node.meta["module_path"] = layer_path(node)
        elif node.op == "call_function" and parameters:
            node.meta["module_path"] = str(parameters[0].target).rpartition(".")[0]


def _switch_modes(graph_module: fx.GraphModule) -> None:
    """Let `train` and `eval` work on the graph; a copy loses such methods and gets its own."""
    graph_module.train = MethodType(_train, graph_module)  # type: ignore[method-assign]
    graph_module.eval = MethodType(_eval, graph_module)  # type: ignore[method-assign]


def _train(self: fx.GraphModule, mode: bool = True) -> fx.GraphModule:
    # torchao forbids both: its functions switch the operators, and here there are modules, too.
    nn.Module.train(self, mode)
    if any(_has_modes(node) for node in self.graph.nodes):
        (move_exported_model_to_train if mode else move_exported_model_to_eval)(self)
    return self


def _has_modes(node: fx.Node) -> bool:
    """Whether torchao's functions, which take seconds, would change what the node computes."""
    if node.op != "call_function":
        return False
    name = str(node.target)
    # diffusers' models have dropout with a probability of zero.
    return "batch_norm" in name or ("dropout" in name and bool(node.args[1] != 0))


def _eval(self: fx.GraphModule) -> fx.GraphModule:
    return _train(self, False)


def _strip(graph_module: fx.GraphModule) -> None:
    """Keep the quantizers of compute operators on the sample's path, and of their weights.

    Other quantizers than `TDQQuantizer` annotate additions, too, and what sees the timestep only.
    """
    graph = graph_module.graph
    depends = sources(graph)
    for node in quantizer_nodes(graph):
        users = node.users if sees_samples(depends[node]) else ()
        _keep_for(node, [user for user in users if node in _operands(user).values()])
    for node in _weight_quantizer_nodes(graph_module):
        _keep_for(node, [u for u in node.users if is_layer(u) and sees_samples(depends[u])])
    graph_module.delete_all_unused_submodules()
    graph_module.recompile()


def _keep_for(node: fx.Node, kept: list[fx.Node]) -> None:
    (source,) = node.all_input_nodes
    for user in list(node.users):
        if user not in kept:
            user.replace_input_with(node, source)
    if not node.users:
        node.graph.erase_node(node)


def _operands(node: fx.Node) -> dict[int, Any]:
    return {index: node.args[index] for index in operand_indices(node)}


def _initialise_weights(graph_module: fx.GraphModule) -> None:
    for node in _weight_quantizer_nodes(graph_module):
        quantizer = graph_module.get_submodule(str(node.target))
        assert isinstance(quantizer, TDQWeightFakeQuantize)
        (weight,) = node.all_input_nodes
        follow_loaded_weight(graph_module, str(weight.target), str(node.target))
        if quantizer.scale.numel() == 0:
            quantizer.initialise(graph_module.get_parameter(str(weight.target)))


def _weight_quantizer_nodes(graph_module: fx.GraphModule) -> list[fx.Node]:
    return [
        node
        for node in graph_module.graph.find_nodes(op="call_module")
        if isinstance(graph_module.get_submodule(str(node.target)), TDQWeightFakeQuantize)
    ]


def _named_nodes(graph_module: fx.GraphModule) -> dict[str, fx.Node]:
    """The quantizers in the order of what reads them, by name."""
    quantizers = set(quantizer_nodes(graph_module.graph))
    names = name_quantizers(
        (
            layer_path(node) if is_layer(node) else None,
            {index: operand for index, operand in _operands(node).items() if operand in quantizers},
        )
        for node in graph_module.graph.nodes
    )
    return {name: node for node, name in names.items()}


def _separate(graph_module: fx.GraphModule, nodes: Iterable[fx.Node]) -> None:
    """Give nodes that share one quantizer, as specifications of torchao can ask, one each."""
    seen: set[TDQFakeQuantize] = set()
    for node in nodes:
        quantizer = _module(graph_module, node)
        if quantizer in seen:
            path = f"{node.target}_{node.name}"
            graph_module.add_submodule(path, copy.deepcopy(quantizer))
            node.target = path
        seen.add(quantizer)


def _module(graph_module: fx.GraphModule, node: fx.Node) -> TDQFakeQuantize:
    return cast(TDQFakeQuantize, graph_module.get_submodule(str(node.target)))
