"""NNCF under the contract: hooks on functions, placed by `nncf.quantize`."""

import logging
from types import MappingProxyType

import nncf
import torch
from contract.networks import BATCHES
from nncf.torch.function_hook import get_hook_storage
from nncf.torch.quantization.layers import BaseQuantizer

from tdq_plugin.adapters.nncf import prepare, strip, tdq_quantize_settings
from tdq_plugin.grid import weight_grid
from tdq_plugin.weights import WeightQuantizer

__all__ = ["NNCF"]


class NNCF:
    name = "nncf"
    lacks = MappingProxyType(
        {
            "torch's rounding": "NNCF rounds in its own way; see adapters/nncf/test_quantizer.py",
            "grids of products": "NNCF chooses them, and which products it quantizes",
            "calibration": "nncf.quantize has calibrated the model, so it runs after attach",
            "weights loaded late": "refused; see adapters/nncf/test_training.py",
            "threads": "NNCF's hooks change the modules for the time of a call",
            "compilation": "torch.compile cannot trace NNCF's hooks",
        }
    )

    def prepare(self, model, example_inputs, activations, weights):
        nncf.set_log_level(logging.ERROR)
        quantized = nncf.quantize(model, nncf.Dataset(BATCHES), **tdq_quantize_settings())
        return prepare(quantized, example_inputs, activations, weights, first_last_bits=None)

    def with_quantized_weights(self, frozen):
        """With the weights of the other adapters; NNCF has weight quantizers of its own."""
        storage = get_hook_storage(frozen)
        for name, hook in list(storage.named_hooks()):
            if isinstance(hook, BaseQuantizer):
                layer = frozen.get_submodule(name.split(".")[1].split("/")[0])
                quantizer = WeightQuantizer(weight_grid(hook.num_bits))
                quantizer.initialise(layer.weight)
                with torch.no_grad():
                    layer.weight.copy_(quantizer(layer.weight))
                storage.delete_hook(name)
        return frozen

    def exportable(self, frozen):
        return strip(frozen)
