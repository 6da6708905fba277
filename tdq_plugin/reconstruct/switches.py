"""Switch quantizers off and gradients off for a while."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

from tdq_plugin.attach import named_quantizers
from tdq_plugin.weights import WeightQuantizer

__all__ = ["only_trainable", "quantization"]


@contextmanager
def quantization(model: nn.Module, enabled: bool) -> Iterator[None]:
    """Switch all activation and weight quantizers of a model on or off for a while."""
    activations = [quantizer for _, quantizer in named_quantizers(model)]
    weights = [m for m in model.modules() if isinstance(m, WeightQuantizer)]
    modes, switches = [q.mode for q in activations], [w.enabled for w in weights]
    for quantizer in activations:
        quantizer.mode = "quantize" if enabled else "off"
    for weight in weights:
        weight.enabled = enabled
    try:
        yield
    finally:
        for quantizer, mode in zip(activations, modes, strict=True):
            quantizer.mode = mode
        for weight, switch in zip(weights, switches, strict=True):
            weight.enabled = switch


@contextmanager
def only_trainable(model: nn.Module, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Within the block, only these parameters of the model require a gradient."""
    wanted = set(parameters)
    before = {p: p.requires_grad for p in model.parameters()}
    try:
        for parameter in before:
            parameter.requires_grad_(parameter in wanted)
        yield
    finally:
        for parameter, required in before.items():
            parameter.requires_grad_(required)
            parameter.grad = None
