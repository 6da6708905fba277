"""torch.ao fake-quantize classes: activations by a scale bank, weights by LSQ per channel."""

from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.ao.quantization import FakeQuantizeBase, MinMaxObserver

from tdq_plugin.adapters.fake_quantize_switches import ActivationSwitches, WeightSwitches
from tdq_plugin.graph.decompose import decompose
from tdq_plugin.grid import activation_grid, weight_grid
from tdq_plugin.weights import follow_loaded_weight

__all__ = ["TDQFakeQuantize", "TDQWeightFakeQuantize", "initialise_weights"]


class TDQFakeQuantize(ActivationSwitches, FakeQuantizeBase):
    """Activation fake-quantize for a `QConfig`; its scale is a row of the model's scale bank.

    It keeps no running statistics: calibrate with `tdq_plugin.calibrate`. torch.ao's
    `disable_fake_quant` and `enable_fake_quant` work; its observer switches have nothing to do.

    Args:
        bits: 2 to 8.
        symmetric: Signed codes and a zero point of 0; else unsigned codes with a zero point.

    Example:
        >>> constructor = TDQFakeQuantize.with_args(bits=4)
        >>> constructor().quant_max
        15
    """

    is_dynamic = False
    ch_axis = -1
    own_convert = "tdq_plugin.adapters.torch_ao.convert, or tdq_plugin.lower_to_int8"

    def __init__(self, bits: int = 8, symmetric: bool = False) -> None:
        super().__init__(activation_grid(bits, symmetric))
        self.quant_min, self.quant_max = self.grid.quant_min, self.grid.quant_max
        self.dtype = torch.qint8 if symmetric else torch.quint8
        self.qscheme = torch.per_tensor_symmetric if symmetric else torch.per_tensor_affine
        # torch.ao's prepare reads dtype and range from an observer of this name.
        self.activation_post_process = MinMaxObserver(
            dtype=self.dtype,
            qscheme=self.qscheme,
            quant_min=self.quant_min,
            quant_max=self.quant_max,
        )

    def convert(self, model: fx.GraphModule, node: fx.Node) -> None:
        """Called by torch.ao's convert: replace this quantizer by decomposed operators."""
        decompose(model, node, self)


class TDQWeightFakeQuantize(WeightSwitches, FakeQuantizeBase):
    """Weight fake-quantize for a `QConfig`: per output channel, LSQ gradients.

    Like torch.ao's own, it takes its first scales from the first weight that it sees.

    Args:
        bits: 2 to 8.
        symmetric: A zero point of 0, as integer kernels take it; else a constant one per channel.
        factory_kwargs: Passed by torch.ao's QAT modules; device and dtype follow the weight.
    """

    is_dynamic = False
    is_per_channel = True
    ch_axis = 0
    dtype = torch.qint8

    def __init__(
        self,
        bits: int = 8,
        symmetric: bool = True,
        factory_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(weight_grid(bits, symmetric))
        self.quant_min, self.quant_max = self.grid.quant_min, self.grid.quant_max
        self.activation_post_process = nn.Identity()

    @property
    def qscheme(self) -> torch.qscheme:
        """What torch.ao calls the grid."""
        return torch.per_channel_symmetric if self.grid.symmetric else torch.per_channel_affine


def initialise_weights(model: nn.Module) -> None:
    """Set the scales of all weight quantizers that have none yet, from the layers' weights.

    Float weights that are loaded later set them anew.
    """
    for module in model.modules():
        quantizer = getattr(module, "weight_fake_quant", None)
        if isinstance(quantizer, TDQWeightFakeQuantize):
            follow_loaded_weight(module, "weight", "weight_fake_quant")
            if quantizer.scale.numel() == 0:
                quantizer.initialise(cast(Tensor, module.weight))
