"""The proxy between a Brevitas layer and its TDQ quantizer."""

from typing import Any, cast

from brevitas.proxy.runtime_quant import ActQuantProxyFromInjector
from torch import Tensor, nn

from tdq_plugin.adapters.brevitas.tensor_quant import TDQTensorQuant
from tdq_plugin.errors import AdapterError

__all__ = ["TDQActQuantProxy"]


class TDQActQuantProxy(ActQuantProxyFromInjector):
    """`ActQuantProxyFromInjector` for a scale that depends on the timestep.

    Brevitas rebuilds the tensor quantizer whenever it loads a state dict; what `attach` gave to
    the old one goes over to the new one.
    """

    @property
    def tdq_tensor_quant(self) -> TDQTensorQuant:
        """The tensor quantizer as it is now."""
        return cast(TDQTensorQuant, self.fused_activation_quant_proxy.tensor_quant)

    def init_tensor_quant(self) -> None:
        """Called by Brevitas, once for each layer that is served and when a state dict loads."""
        injector = self.quant_injector
        tensor_quant = injector.tensor_quant
        tensor_quant.layers = self.tracked_module_list
        if hasattr(self, "fused_activation_quant_proxy"):
            tensor_quant.take_over(self.tdq_tensor_quant)
        activation = injector.act_impl if "act_impl" in injector else None
        # The clamp of a Hardtanh is that of the quantizer.
        if activation is None or isinstance(activation, nn.Hardtanh):
            activation = nn.Identity()
        self.fused_activation_quant_proxy = _FusedActivation(activation, tensor_quant)
        self.is_quant_enabled = True

    def compile_quant(self, compile_export: bool = False) -> None:
        """Compile the arithmetic, for the mode of inference as for any other.

        The row is read outside: it is another number in each quantizer, and each would be
        compiled anew.
        """
        self.tdq_tensor_quant.quantizer.compile()

    def create_quant_tensor(self, qt_args: Any, x: Any) -> Any:
        """A `QuantTensor` where the call has one scale, else the values alone.

        Brevitas' arithmetic of quantized tensors takes the one dimension of a scale for channels.
        """
        if isinstance(qt_args, tuple) and qt_args[1].numel() > 1:
            return qt_args[0]
        return super().create_quant_tensor(qt_args, x)

    def bit_width(self, force_eval: bool = True) -> Tensor | None:
        """The bits, which depend on no timestep; None while quantization is switched off."""
        if not self.is_quant_enabled:
            return None
        bits: Tensor = self.tdq_tensor_quant.msb_clamp_bit_width_impl()
        return bits

    def scale(self, force_eval: bool = True) -> Tensor:
        """Refused: a single scale would throw the timestep away.

        Raises:
            AdapterError: Always.
        """
        raise AdapterError(
            "A TDQ activation has no single scale. Its scales are a row of "
            "tdq_plugin.scale_bank(model)."
        )

    def zero_point(self, force_eval: bool = True) -> Tensor:
        """Refused, as `scale` is.

        Raises:
            AdapterError: Always.
        """
        raise AdapterError(
            "A TDQ activation has no single zero point. Its zero points are a row of "
            "tdq_plugin.scale_bank(model)."
        )

    @property
    def requires_export_handler(self) -> bool:
        """Whether exports need a handler; Brevitas asks when it has found none.

        Raises:
            AdapterError: There is none. Brevitas would go on with None.
        """
        if self.is_quant_enabled and self.export_handler is None:
            raise AdapterError(
                "This export of Brevitas knows no TDQ activations: it has no handler for "
                f"{type(self).__name__}. Use one of those in tdq_plugin.adapters.brevitas."
            )
        return bool(self.is_quant_enabled)


class _FusedActivation(nn.Module):
    """As `FusedActivationQuantProxy`, which TorchScript compiles if `BREVITAS_JIT` is set."""

    def __init__(self, activation_impl: nn.Module, tensor_quant: nn.Module) -> None:
        super().__init__()
        self.activation_impl, self.tensor_quant = activation_impl, tensor_quant

    def forward(self, x: Tensor) -> Any:
        return self.tensor_quant(self.activation_impl(x))
