"""The adapters that the contract is run against. A new adapter joins by a class in `ADAPTERS`."""

import copy
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from types import MappingProxyType
from typing import Any, Protocol

from contract.brevitas_adapter import Brevitas
from contract.networks import TinyDenoiser, example_inputs
from contract.nncf_adapter import NNCF
from torch import nn
from torch.ao.quantization.quantize_fx import prepare_fx, prepare_qat_fx
from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e

import tdq_plugin as tdq
from tdq_plugin.adapters import pt2e
from tdq_plugin.adapters.pt2e import TDQQuantizer
from tdq_plugin.adapters.torch_ao import (
    convert,
    quantize_eager,
    tdq_backend_config,
    tdq_qconfig_mapping,
)

__all__ = ["ADAPTERS", "AdapterUnderTest", "exportable", "inference"]


class AdapterUnderTest(Protocol):
    """What the contract needs to know of a framework."""

    name: str

    def prepare(
        self, model: nn.Module, example_inputs: tuple[Any, ...], activations: int, weights: int
    ) -> nn.Module:
        """The framework's prepare step, with so many bits for every layer."""

    def with_quantized_weights(self, frozen: nn.Module) -> nn.Module:
        """The frozen model, converted where the framework quantizes weights only then."""


class TorchAOGraphQAT:
    name = "torch_ao_fx_qat"

    def prepare(self, model, example_inputs, activations, weights):
        graph = tdq.trace(model, example_inputs).train()
        mapping = tdq_qconfig_mapping(graph, activations, weights, first_last_bits=None)
        backend = tdq_backend_config()
        return prepare_qat_fx(graph, mapping, example_inputs, backend_config=backend)

    def with_quantized_weights(self, frozen):
        return frozen


class TorchAOGraphPTQ:
    name = "torch_ao_fx_ptq"

    def prepare(self, model, example_inputs, activations, weights):
        graph = tdq.trace(model, example_inputs).eval()
        mapping = tdq_qconfig_mapping(graph, activations, weights, first_last_bits=None)
        return prepare_fx(graph, mapping, example_inputs, backend_config=tdq_backend_config())

    def with_quantized_weights(self, frozen):
        return convert(frozen)


class TorchAOEager:
    name = "torch_ao_eager"
    lacks = MappingProxyType({"products": "without a graph, only modules are quantized"})

    def prepare(self, model, example_inputs, activations, weights):
        return quantize_eager(model, activations, weights, first_last_bits=None)

    def with_quantized_weights(self, frozen):
        return frozen


@cache
def _exported(network, *arguments):
    """Export takes its seconds, and knows the weights of the model as parameters only."""
    return pt2e.export(network(*arguments).eval(), example_inputs())


class PT2E:
    name = "pt2e"

    def prepare(self, model, example_inputs, activations, weights):
        quantizer = TDQQuantizer(activations, weights, first_last_bits=None)
        arguments = (model.attention,) if type(model) is TinyDenoiser else ()
        exported = copy.deepcopy(_exported(type(model), *arguments))
        missing, _ = exported.load_state_dict(model.state_dict(), strict=False)
        assert not set(missing) & set(model.state_dict())
        return prepare_qat_pt2e(exported, quantizer)

    def with_quantized_weights(self, frozen):
        return frozen


ADAPTERS: list[AdapterUnderTest] = [
    TorchAOGraphQAT(),
    TorchAOGraphPTQ(),
    TorchAOEager(),
    PT2E(),
    Brevitas(),
    NNCF(),
]


def exportable(adapter: AdapterUnderTest, frozen: nn.Module) -> nn.Module:
    """The model that `torch.export` takes, where it is another one."""
    convert_for_export = getattr(adapter, "exportable", lambda model: model)
    return convert_for_export(frozen)


def inference(adapter: AdapterUnderTest, frozen: nn.Module) -> AbstractContextManager[None]:
    """The framework's own mode for compiling and exporting a frozen model, where it has one."""
    mode = getattr(adapter, "inference", nullcontext)
    return mode(frozen)
