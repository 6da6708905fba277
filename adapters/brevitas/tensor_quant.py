"""What Brevitas calls a tensor quantizer: from an activation to its quantized values and scale."""

from typing import Literal, get_args

from brevitas.core.bit_width import BitWidthConst
from brevitas.core.function_wrapper import RoundSte
from brevitas.core.restrict_val import (
    FloatRestrictValue,
    LogFloatRestrictValue,
    PowerOfTwoRestrictValue,
)
from torch import Tensor, nn

from tdq_plugin.adapters.brevitas.bank_choice import BankChoice
from tdq_plugin.adapters.brevitas.own_arithmetic import BrevitasActivationQuantizer
from tdq_plugin.errors import AdapterError, ConfigError
from tdq_plugin.fake_quantize import per_sample
from tdq_plugin.grid import QuantizationGrid
from tdq_plugin.hooks import ScaleRow
from tdq_plugin.options import check_option
from tdq_plugin.quantizer import ActivationQuantizer, Estimator

__all__ = ["TDQTensorQuant"]

Quantized = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]


class TDQTensorQuant(nn.Module):
    """Takes the place of `RescalingIntQuant`; the scale is a row of the model's bank.

    Brevitas injects the arguments by their names, from the attributes of the quantizer's class.

    Args:
        tdq_grid: The integer codes.
        tdq_estimator: As `ActivationQuantizer.estimator`, or `brevitas` for Brevitas' arithmetic.
        tdq_bank_choice: The bank that the quantizer asks for, if it does.
        int_quant: Brevitas' arithmetic.
        bit_width_impl: Returns the bits.
        restrict_scaling_impl: What scales may be: any float, or powers of two.
        scaling_shape: `()`.

    Attributes:
        quantizer: The quantizer as the rest of tdq-plugin knows it.
        row: Where scales come from; None until `tdq_plugin.attach`.
        layers: The layers that are served.
        observer_only: Set by Brevitas where the result is thrown away.
        collect_stats_steps: Set by Brevitas' `calibration_mode`.

    Raises:
        ConfigError: The quantizer's class asks for what a TDQ activation cannot be.
    """

    def __init__(
        self,
        tdq_grid: QuantizationGrid,
        tdq_estimator: Estimator | Literal["brevitas"],
        tdq_bank_choice: BankChoice | None,
        int_quant: nn.Module,
        bit_width_impl: nn.Module,
        restrict_scaling_impl: nn.Module,
        scaling_shape: tuple[int, ...],
    ) -> None:
        super().__init__()
        _check_granularity(bit_width_impl, scaling_shape)
        # Brevitas' tools look for these two by their names.
        self.int_quant, self.msb_clamp_bit_width_impl = int_quant, bit_width_impl
        self.restrict = _restriction(restrict_scaling_impl)
        self.quantizer: ActivationQuantizer
        check_option("tdq_estimator", tdq_estimator, (*get_args(Estimator), "brevitas"))
        if tdq_estimator == "brevitas":
            self.quantizer = BrevitasActivationQuantizer(tdq_grid, int_quant, bit_width_impl)
        else:
            _check_rounding(int_quant)
            self.quantizer = ActivationQuantizer(tdq_grid)
            self.quantizer.estimator = tdq_estimator
        self.quantizer.bank = tdq_bank_choice
        self.row: ScaleRow | None = None
        self.layers: list[nn.Module] = []
        self.observer_only = False
        self.collect_stats_steps = 0

    def forward(self, x: Tensor) -> Quantized:
        """Quantize and dequantize `x`.

        Returns:
            The values; scale and zero point, of shape `()` or such that they broadcast along the
            samples; and the bits. The last three are None where nothing was quantized.

        Raises:
            AdapterError: The model is not attached, or only a part of it is being calibrated.
            TimestepError: The quantizer runs outside of a call of its model.
        """
        if self.row is None:
            raise AdapterError(
                "A TDQ quantizer was called without a scale. Call tdq_plugin.attach(model) once "
                "the model has its Brevitas layers."
            )
        dimension = self.batch_dimension
        samples = x.transpose(0, dimension)
        if self.quantizer.mode != "quantize":
            return self.quantizer(samples).transpose(0, dimension), None, None, None
        if self.observer_only:
            self._check_observer()
            return x, None, None, None
        scale, zero_point = self.row.take()
        scale = self.restricted(scale)
        values = self.quantizer(samples, scale, zero_point).transpose(0, dimension)
        scale, zero_point = (
            row if row.dim() == 0 else row.transpose(0, dimension)
            for row in (per_sample(scale, samples), per_sample(zero_point, samples))
        )
        return values, scale, zero_point, self.msb_clamp_bit_width_impl()

    @property
    def batch_dimension(self) -> int:
        """The samples' dimension: the projections inside `QuantMultiheadAttention` see (L, N, E).

        Brevitas marks them after they are built, so it is read at every call.
        """
        return getattr(self.layers[0], "batch_dim", 0) if self.layers else 0

    def restricted(self, scale: Tensor) -> Tensor:
        """The scale that is used where the bank gives `scale`."""
        return scale if self.restrict is None else self.restrict(scale)

    def take_over(self, previous: "TDQTensorQuant") -> None:
        """Go on with the quantizer and the row of one that Brevitas rebuilds.

        Raises:
            AdapterError: It is attached, and its codes are others than the new ones.
        """
        if previous.row is None:
            return
        if previous.quantizer.grid != self.quantizer.grid:
            raise AdapterError(
                f"The quantizer {previous.quantizer.name!r} was attached with "
                f"{previous.quantizer.grid} and would now have {self.quantizer.grid}. "
                "Set the bits before tdq_plugin.attach."
            )
        self.quantizer, self.row = previous.quantizer, previous.row

    def init_scale(self) -> None:
        """Brevitas' `calibration_mode` ends. The model's bank is set as a whole, not from here."""
        self.collect_stats_steps = 0

    def _check_observer(self) -> None:
        if self.collect_stats_steps:
            raise AdapterError(
                f"calibration_mode runs on a part of the model that {self.quantizer.name!r} was "
                "attached in. Run it on the whole model: its scale bank is one."
            )


def _restriction(impl: nn.Module) -> nn.Module | None:
    # The output of a bank is positive by itself, so that LOG_FP is what FP is.
    if isinstance(impl, FloatRestrictValue | LogFloatRestrictValue):
        return None
    if isinstance(impl, PowerOfTwoRestrictValue):
        return nn.Sequential(impl.restrict_init_module(), impl)
    raise ConfigError(
        f"restrict_scaling_type is solved to {type(impl).__name__}. A TDQ activation takes 'fp', "
        "'log_fp' or 'power_of_two'."
    )


def _check_granularity(bit_width_impl: nn.Module, scaling_shape: tuple[int, ...]) -> None:
    if scaling_shape != ():
        raise ConfigError(
            f"A TDQ activation has one scale per timestep, not scales of shape {scaling_shape}. "
            "Leave scaling_per_output_type at 'tensor'."
        )
    if not isinstance(bit_width_impl, BitWidthConst):
        raise ConfigError(
            f"bit_width_impl_type is solved to {type(bit_width_impl).__name__}. The bits of a TDQ "
            "activation are constant: 'const'."
        )


def _check_rounding(int_quant: nn.Module) -> None:
    rounding = int_quant.float_to_int_impl
    if not isinstance(rounding, RoundSte):
        raise ConfigError(
            f"float_to_int_impl_type is solved to {type(rounding).__name__}, and TDQ's estimators "
            "round to nearest. Use tdq_estimator='brevitas' for other roundings."
        )
