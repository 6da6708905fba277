"""How each export of Brevitas writes a TDQ activation: one handler class for each format."""

from typing import cast

import torch
from brevitas.export.common.handler.base import BaseHandler
from brevitas.export.onnx.handler import ONNXBaseHandler
from brevitas.export.onnx.qonnx.function import BrevitasQuantOp
from brevitas.export.onnx.standard.qcdq.handler import StdQCDQCastONNXMixin
from torch import Tensor

from tdq_plugin.adapters.brevitas.proxy import TDQActQuantProxy
from tdq_plugin.errors import AdapterError
from tdq_plugin.hooks import ScaleRow

__all__ = ["OnnxQCDQHandler", "QONNXHandler", "TorchQCDQHandler"]

Quantized = tuple[Tensor, None, None, None]


class _TDQHandler(BaseHandler):
    """Reads the scale of the call where Brevitas' handlers keep one from before the export."""

    handled_layer = TDQActQuantProxy

    def prepare_for_export(self, module: TDQActQuantProxy) -> None:
        """Called by Brevitas for each proxy before it traces.

        Raises:
            AdapterError: The quantizer does not quantize by the bank's scales, or does not round
                to nearest.
        """
        tensor_quant = module.tdq_tensor_quant
        quantizer = tensor_quant.quantizer
        if quantizer.mode != "quantize":
            raise AdapterError(
                f"The quantizer {quantizer.name!r} is in mode {quantizer.mode!r}, which is not "
                "exported. Set its mode to 'quantize'."
            )
        if module.rounding_mode.upper() != "ROUND":
            raise AdapterError(
                f"The quantizer {quantizer.name!r} has float_to_int_impl_type = "
                f"{module.rounding_mode!r}; exported ones round to nearest: 'round'."
            )
        self.name, self.grid = quantizer.name, quantizer.grid
        self.row = cast(ScaleRow, tensor_quant.row)
        self.dimension = tensor_quant.batch_dimension
        self.bits = module.bit_width()

    def symbolic_execution(self, x: Tensor) -> Quantized:
        """The quantized values, without the metadata of a `QuantTensor`."""
        scale, zero_point = (self._along_samples(row, x) for row in self.row.take())
        return self.quantized(x, scale, zero_point), None, None, None

    def quantized(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """Quantize and dequantize; scale and zero point have shape `()`, or they broadcast."""
        raise NotImplementedError

    def _along_samples(self, row: Tensor, x: Tensor) -> Tensor:
        """As `tdq_plugin.fake_quantize.per_sample`, in operators for any number of samples."""
        samples = int(row.shape[0])
        if samples == 1:
            return row.reshape(())
        repeats = int(x.shape[self.dimension]) // samples
        if repeats > 1:
            row = row[:, None].expand(-1, repeats)
        return row.reshape([-1 if d == self.dimension else 1 for d in range(x.dim())])


class OnnxQCDQHandler(StdQCDQCastONNXMixin, _TDQHandler, ONNXBaseHandler):
    """QuantizeLinear, Clip below 8 bits, DequantizeLinear.

    QuantizeLinear divides by the scale, tdq-plugin multiplies by its reciprocal: where a value
    lies within a rounding error of a tie, the code may differ by one.
    """

    def quantized(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        if scale.dim() == 0:
            return self._per_tensor(x, scale, zero_point)
        if zero_point.dim() > 0:
            raise AdapterError(
                f"The zero point of {self.name!r} moves with t, and this format has no zero point "
                "for each sample. Give an example with one timestep for the batch, or use qonnx."
            )
        # Engines take a scale for each channel of a weight, and none for each sample.
        return self._per_tensor(x * (1 / scale), torch.ones(()), zero_point) * scale

    def _per_tensor(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        integer = torch.int8 if self.grid.signed else torch.uint8
        zero_point = zero_point.to(integer)
        codes = self.quantize_fn(x, scale, zero_point, integer, None)
        limits = self.grid.quant_min, self.grid.quant_max
        if limits[1] - limits[0] < 255:
            codes = self.clip_fn(codes, *(torch.tensor(code, dtype=integer) for code in limits))
        values: Tensor = self.dequantize_fn(codes, scale, zero_point, None)
        return values


class TorchQCDQHandler(_TDQHandler):
    """Codes as an integer tensor; bit-equal to `tdq_plugin.fake_quantize`."""

    def forward(self, x: Tensor) -> Quantized:
        return self.symbolic_execution(x)

    def quantized(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        codes = (x * (1 / scale)).round() + zero_point
        codes = codes.clamp(self.grid.quant_min, self.grid.quant_max)
        codes = codes.to(torch.int8 if self.grid.signed else torch.uint8)
        return (codes - zero_point) * scale


class QONNXHandler(_TDQHandler, ONNXBaseHandler):
    """QONNX's Quant."""

    def quantized(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        narrow = self.grid.quant_max - self.grid.quant_min + 1 < 2**self.grid.bits
        arguments = scale, zero_point, self.bits, narrow, self.grid.signed, "ROUND"
        values: Tensor = self.export_op(BrevitasQuantOp, x, *arguments)
        return values
