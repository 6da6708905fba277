"""`prepare`: give the quantizers that `nncf.quantize` placed to TDQ."""

import inspect
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

from nncf.torch.function_hook import get_hook_storage
from nncf.torch.function_hook.nncf_graph.nncf_graph_builder import build_nncf_graph
from nncf.torch.function_hook.wrapper import is_wrapped
from nncf.torch.quantization.layers import BaseQuantizer
from torch import Tensor, nn

from tdq_plugin.adapters.nncf.placement import Site, find_sites, layers
from tdq_plugin.adapters.nncf.quantizer import TDQQuantizer
from tdq_plugin.adapters.nncf.weights import weight_quantizer
from tdq_plugin.errors import AdapterError, TimestepError
from tdq_plugin.grid import check_bits
from tdq_plugin.layer_names import choose_layers
from tdq_plugin.quantizer_names import name_quantizers
from tdq_plugin.timestep import find_timestep_argument

__all__ = ["prepare"]

Model = TypeVar("Model", bound=nn.Module)


def prepare(
    model: Model,
    example_inputs: tuple[Any, ...] | dict[str, Any],
    activation_bits: int = 8,
    weight_bits: int = 8,
    first_last_bits: int | None = 8,
    timestep_argument: str | None = None,
    float_layers: Sequence[str] = (),
) -> Model:
    """Exchange NNCF's activation quantizers for TDQ's; in place. `tdq_plugin.attach` comes next.

    NNCF's quantizers of the operands of layers and matrix products are kept, with the ranges that
    `nncf.quantize` found; those of other values (before an interpolation, after the last layer)
    are removed. Weight quantizers stay NNCF's own.

    Args:
        model: What `nncf.quantize` returned.
        example_inputs: One call of the model, as `nncf.Dataset` gives it: NNCF's hooks alone do
            not say which layers they belong to. The timestep must be a tensor.
        activation_bits: 2 to 8.
        weight_bits: 2 to 8.
        first_last_bits: Bits of the first and last layer, as is usual; None treats them as others.
        timestep_argument: Name of forward's argument that holds the timestep, if it is not
            `timestep`, `timesteps` or `t`.
        float_layers: Layers that lose their quantizers: names, names of modules that hold layers,
            or wildcards. An input that NNCF quantizes for other layers as well stays quantized.

    Returns:
        The model.

    Raises:
        AdapterError: NNCF did not quantize the model, it quantized the timestep's path, it made a
            quantizer that TDQ cannot use, the model is prepared already, or the example is no
            call of it. It is as it was.
        ConfigError: Bits are not 2 to 8, or an entry of `float_layers` matches no layer.
        TimestepError: The model has no timestep argument, or the example gives no tensor for it.
    """
    check_bits(activation_bits, weight_bits, first_last_bits)
    sites = _sites(model, example_inputs, timestep_argument)
    names = layers(sites)
    outer = {*names[:1], *names[-1:]} if first_last_bits is not None else set()
    used = _without(sites, choose_layers(names, float_layers))

    def bits_of(site: Site, bits: int) -> int:
        is_outer = any(operand.layer in outer for operand in site.operands)
        return first_last_bits if is_outer and first_last_bits is not None else bits

    exchanged: list[tuple[Site, nn.Module]] = []
    for site in used:
        if site.weight is not None:
            weight = _weight(model, site.weight)
            bits = bits_of(site, weight_bits)
            exchanged.append((site, weight_quantizer(site.quantizer, weight, bits)))
    named = _name([site for site in used if site.weight is None])
    for order, (name, site) in enumerate(named.items()):
        site.quantizer.num_bits = bits_of(site, activation_bits)
        exchanged.append((site, TDQQuantizer.from_native(site.quantizer, name, order)))
    _exchange(model, sites, exchanged)
    return model


def _sites(model: nn.Module, example_inputs: Any, timestep_argument: str | None) -> list[Site]:
    """The quantizers of the model, all of which TDQ can use."""
    _check_model(model)
    timestep = find_timestep_argument(model.forward, timestep_argument)
    _check_example(model, example_inputs)
    graph = build_nncf_graph(model, example_inputs)
    inputs = [node.node_name for node in graph.get_input_nodes()]
    if timestep not in inputs:
        raise TimestepError(
            f"The example inputs have tensors for {inputs}, but none for the timestep "
            f"{timestep!r}. Give it as a tensor."
        )
    sites = find_sites(model, graph)
    _check_timestep_path(sites, timestep, next(name for name in inputs if name != timestep))
    for site in sites:
        if site.weight is None and site.quantizer.per_channel:
            raise AdapterError(
                f"NNCF's quantizer {site.hooks[0]!r} has a scale for each channel of an "
                "activation; TDQ has one for each timestep. Call nncf.quantize with "
                "per_channel=False in activations_quantization_params, as in "
                "tdq_quantize_settings()."
            )
    return sites


def _check_example(model: nn.Module, example_inputs: Any) -> None:
    by_name = isinstance(example_inputs, dict)
    args, kwargs = ((), example_inputs) if by_name else (tuple(example_inputs), {})
    try:
        inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise AdapterError(
            f"example_inputs are no call of this {type(model).__name__}: {error}. Give what "
            "nncf.Dataset gives: a tuple (sample, timestep, ...) or a dictionary by name."
        ) from error


def _check_model(model: nn.Module) -> None:
    if any(isinstance(module, TDQQuantizer) for module in model.modules()):
        raise AdapterError(
            f"This {type(model).__name__} is prepared already, and NNCF's own quantizers are gone. "
            "For other bits or layers, call nncf.quantize on the float model again, then prepare."
        )
    if not is_wrapped(model) or not any(isinstance(m, BaseQuantizer) for m in model.modules()):
        raise AdapterError(
            f"This {type(model).__name__} has no quantizers of NNCF. Give what "
            "nncf.quantize(model, dataset, **tdq_quantize_settings()) returned."
        )


def _check_timestep_path(sites: list[Site], timestep: str, sample: str) -> None:
    wrong = [site for site in sites if timestep in site.inputs and sample not in site.inputs]
    if not wrong:
        return
    names = dict.fromkeys(operand.name for site in wrong for operand in site.operands)
    # One pattern for all blocks of a model.
    missing = dict.fromkeys(re.sub(r"\d+", r"\\d+", re.escape(name)) for name in names)
    patterns = ", ".join(f'r"{pattern}"' for pattern in missing)
    settings = f"timestep_patterns=[*TIMESTEP_PATTERNS, {patterns}]" if missing else ""
    raise AdapterError(
        f"NNCF quantized the timestep's own path: {next(iter(names), wrong[0].hooks[0])!r} depends "
        f"on {timestep!r} and not on {sample!r}, so near timesteps become one. Quantize the float "
        f"model by nncf.quantize(model, dataset, **tdq_quantize_settings({settings}))."
    )


def _weight(model: nn.Module, path: str) -> Tensor:
    """A parameter, or a buffer: the kernel of a blur."""
    owner, _, name = path.rpartition(".")
    weight: Tensor = getattr(model.get_submodule(owner), name)
    return weight


def _without(sites: list[Site], float_layers: list[str]) -> list[Site]:
    """The sites that quantize operands of other layers or of products, with these operands."""
    excluded = set(float_layers)
    used = (
        replace(site, operands=tuple(o for o in site.operands if o.layer not in excluded))
        for site in sites
    )
    return [site for site in used if site.operands]


def _name(sites: list[Site]) -> dict[str, Site]:
    """The quantizers in order of execution, by name."""
    consumers: dict[int, tuple[str | None, dict[int, Site]]] = {}
    for site in sites:
        for operand in site.operands:
            _, operands = consumers.setdefault(operand.operation, (operand.layer, {}))
            operands[operand.port] = site
    names = name_quantizers(consumers[operation] for operation in sorted(consumers))
    return {names[site]: site for site in sites}


def _exchange(model: nn.Module, sites: list[Site], exchanged: list[tuple[Site, nn.Module]]) -> None:
    storage = get_hook_storage(model)
    for site, module in exchanged:
        for hook in site.hooks:
            storage.set_submodule(hook, module.train(model.training))
    kept = {hook for site, _ in exchanged for hook in site.hooks}
    for site in sites:
        for hook in set(site.hooks) - kept:
            storage.delete_hook(hook)
