"""Brevitas under the contract: layers exchanged by `layerwise_quantize`."""

from contextlib import contextmanager
from types import MappingProxyType

import torch
from brevitas.export.inference import quant_inference_mode
from brevitas.nn.quant_layer import QuantWeightBiasInputOutputLayer
from contract.networks import STEPS, example_inputs

from tdq_plugin.adapters.brevitas import quantize_layerwise
from tdq_plugin.grid import weight_grid
from tdq_plugin.weights import WeightQuantizer

__all__ = ["Brevitas"]


class Brevitas:
    name = "brevitas"
    lacks = MappingProxyType({"products": "layers are exchanged; other products stay float"})

    def prepare(self, model, example_inputs, activations, weights):
        return quantize_layerwise(
            model, activation_bits=activations, weight_bits=weights, first_last_bits=None
        )

    def with_quantized_weights(self, frozen):
        """With the weights of the other adapters; Brevitas has weight quantizers of its own."""
        for layer in frozen.modules():
            if isinstance(layer, QuantWeightBiasInputOutputLayer):
                quantizer = WeightQuantizer(weight_grid(int(layer.weight_quant.bit_width())))
                quantizer.initialise(layer.weight)
                with torch.no_grad():
                    layer.weight.copy_(quantizer(layer.weight))
                layer.weight_quant.disable_quant = True
        return frozen

    @contextmanager
    def inference(self, frozen):
        with torch.no_grad(), quant_inference_mode(frozen):
            # Brevitas changes to the mode at the end of the first call.
            frozen(example_inputs()[0], STEPS[0])
            yield
