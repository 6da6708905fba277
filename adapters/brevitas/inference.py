"""TDQ inside Brevitas' `quant_inference_mode`, with a table as with generators."""

from typing import Any

from brevitas.export.inference.handler import InferenceHandler
from brevitas.export.inference.manager import InferenceManager
from torch import Tensor

from tdq_plugin.adapters.brevitas.proxy import TDQActQuantProxy

__all__ = ["TDQInferenceHandler"]


class TDQInferenceHandler(InferenceHandler):
    """Quantizes by the scale of the call; Brevitas' handler would keep the first one it sees."""

    handled_layer = TDQActQuantProxy

    def prepare_for_export(self, module: TDQActQuantProxy) -> None:
        """Called by Brevitas for each proxy when the mode begins."""
        super().prepare_for_export(module)
        self.tensor_quant = module.tdq_tensor_quant

    def forward(self, x: Tensor) -> Any:
        return self.tensor_quant(x)

    def quantize(self, x: Tensor) -> Any:
        """The values, their scale, zero point and bits."""
        return self.tensor_quant(x)

    def dequantize(self, x: Tensor) -> Tensor:
        """Nothing to do: `quantize` gives fake-quantized values."""
        return x


if TDQInferenceHandler not in InferenceManager.handlers:
    InferenceManager.handlers.append(TDQInferenceHandler)
