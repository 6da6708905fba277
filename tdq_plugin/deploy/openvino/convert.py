"""`to_openvino`: a frozen model as one OpenVINO model for all timesteps."""

import inspect
from collections.abc import Mapping
from typing import Any

import openvino as ov
from torch import Tensor, fx, nn

from tdq_plugin.deploy.lower import LOOKUP, lower_to_int8
from tdq_plugin.deploy.openvino.eight_bits import store_weights_as_int8, widen_activations
from tdq_plugin.deploy.openvino.model import OpenVINOModel
from tdq_plugin.deploy.openvino.move_scales import move_scales
from tdq_plugin.deploy.openvino.nodes import fake_quantizers, layer_name
from tdq_plugin.deploy.openvino.precision import DEFAULT_PROPERTIES, integer_layers
from tdq_plugin.deploy.openvino.ratios import static_reference
from tdq_plugin.deploy.openvino.report import ConversionReport
from tdq_plugin.deploy.openvino.rewrite import check_bank, rewrite, table_of
from tdq_plugin.deploy.openvino.tabulate import tabulate_timestep_path
from tdq_plugin.deploy.openvino.traced import traced_model
from tdq_plugin.errors import AdapterError, LookupRuleError, TraceError
from tdq_plugin.graph.timestep_node import timestep_input
from tdq_plugin.scales.frozen import FrozenBank
from tdq_plugin.timestep import find_timestep_argument

__all__ = ["to_openvino"]


def to_openvino(
    model: nn.Module,
    example_inputs: tuple[Any, ...] | dict[str, Any],
    *,
    cache_timestep_path: bool = True,
    properties: Mapping[str, Any] | None = None,
) -> OpenVINOModel:
    """Convert a frozen model for OpenVINO's int8 kernels on the CPU.

    Every quantizer is constant in the converted model: the ratio of its scale to a base scale is
    divided off in front of it and multiplied behind the layer, `W Q(x; g s) + b = g W Q(x / g; s)
    + b`. The timestep is an input; batches of mixed timesteps run in the same model.

    Args:
        model: A frozen graph, one from `lower_to_int8` or `load_int8`, or a module of torch
            operations with the ratios in its own forward and the table as its attribute `bank`,
            such as `tdq_plugin.adapters.nncf.strip` gives.
        example_inputs: One call of the model: positional arguments as a tuple, or arguments by
            name. The batch size stays free, other sizes are those of the example.
        cache_timestep_path: Tabulate all that depends on the timestep alone, the time embedding
            and its projections.
        properties: Properties for OpenVINO's CPU plugin, such as
            `{"INFERENCE_NUM_THREADS": 1}`. The precision hint is `f32` unless they say otherwise.

    Returns:
        The converted model, with a report of what became of the scales and layers.

    Raises:
        AdapterError: The model is not frozen, has no table, or has a layer without int8 form.
        LookupRuleError: The table interpolates, or the timestep path shall be cached and the
            lookup rule is not `exact`.
        ScaleError: Zero points move with t.
        TimestepError: The model has no timestep argument.
        TraceError: The example does not fit the model, gives something else than tensors, or the
            model returns more than one tensor.

    Warns:
        UserWarning: A layer that runs on int8 kernels with static scales does not here.
    """
    module, bank, inputs, timestep = _traceable(model, example_inputs)
    if cache_timestep_path:
        _check_lookup(bank)
    mixed = isinstance(module, fx.GraphModule)
    converted = traced_model(module, inputs)
    _name_quantizers(module, converted)
    widen_activations(converted)
    store_weights_as_int8(converted)
    if cache_timestep_path:
        tabulate_timestep_path(converted, timestep, bank.timesteps.numpy(), mixed)
    reference = static_reference(converted)
    readers_left = move_scales(converted)
    properties = {**DEFAULT_PROPERTIES, **(properties or {})}
    ours, static = (integer_layers(m, properties) for m in (converted, reference))
    report = ConversionReport(readers_left, sorted(ours), sorted(static - ours))
    report.warn()
    return OpenVINOModel(converted, bank, timestep, mixed, report, properties)


def _traceable(
    model: nn.Module, example_inputs: tuple[Any, ...] | dict[str, Any]
) -> tuple[nn.Module, FrozenBank, dict[str, Tensor], str]:
    """A module that can be traced, its table, the inputs to trace it with, and which is t."""
    if isinstance(model, fx.GraphModule):
        if not hasattr(model, LOOKUP):
            model = lower_to_int8(model, cache_timestep_path=False)
        bank = table_of(model)
    else:
        bank = _bank_of_module(model)
    check_bank(bank)
    timestep = _timestep_argument(model)
    inputs = _bind(model, example_inputs, timestep)
    batch = next(len(value) for name, value in inputs.items() if name != timestep)
    inputs[timestep] = bank.timesteps[:1].expand(batch).clone()
    module = rewrite(model, inputs) if isinstance(model, fx.GraphModule) else model
    return module, bank, inputs, timestep


def _timestep_argument(model: nn.Module) -> str:
    """A graph knows it, whatever its name is."""
    known = timestep_input(model.graph) if isinstance(model, fx.GraphModule) else None
    return known or find_timestep_argument(inspect.signature(model.forward))


def _check_lookup(bank: FrozenBank) -> None:
    if bank.lookup != "exact":
        raise LookupRuleError(
            f"The timestep path cannot be cached with lookup={bank.lookup!r}: between the table's "
            "timesteps its values are unknown. Pass cache_timestep_path=False."
        )


def _bank_of_module(model: nn.Module) -> FrozenBank:
    bank = getattr(model, "bank", None)
    if not isinstance(bank, FrozenBank):
        raise AdapterError(
            f"This {type(model).__name__} is neither a frozen graph nor a module with a frozen "
            "table as its attribute `bank`. Freeze it, and strip it of the framework's quantizers "
            "if it comes from NNCF."
        )
    return bank


def _bind(
    model: nn.Module, example_inputs: tuple[Any, ...] | dict[str, Any], timestep: str
) -> dict[str, Any]:
    """The arguments of the example call by name, in the order of forward's arguments."""
    args: tuple[Any, ...] = () if isinstance(example_inputs, dict) else example_inputs
    kwargs = example_inputs if isinstance(example_inputs, dict) else {}
    signature = inspect.signature(model.forward)
    try:
        call = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise TraceError(
            f"The example inputs do not fit the model's forward: {error}. "
            f"Its arguments are {list(signature.parameters)}."
        ) from error
    inputs: dict[str, Any] = {}
    for name, value in call.arguments.items():
        is_variadic = signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD
        inputs |= value if is_variadic else {name: value}
    wrong = {
        name: type(value).__name__
        for name, value in inputs.items()
        if name != timestep and not isinstance(value, Tensor)
    }
    if wrong:
        raise TraceError(
            f"The inputs of a converted model are tensors; the example gives {wrong}. Leave out "
            "what the model does not need."
        )
    return inputs


def _name_quantizers(module: nn.Module, model: ov.Model) -> None:
    """Give the quantizers the names that they have in the scale table."""
    modules = module.named_modules(remove_duplicate=False)
    names = {path: m.name for path, m in modules if hasattr(m, "name")}
    for quantizer in fake_quantizers(model):
        path = layer_name(quantizer)
        quantizer.set_friendly_name(names.get(path, path))
