"""The activation quantizer that every adapter uses: it sees `x` and its own scale, never t."""

from typing import Any, Literal, get_args

from torch import Tensor, nn

from tdq_plugin.errors import AdapterError
from tdq_plugin.fake_quantize import StepGradient, fake_quantize
from tdq_plugin.grid import QuantizationGrid
from tdq_plugin.options import check_option
from tdq_plugin.pseudo_quantize import pseudo_quantize
from tdq_plugin.ranges import affine_range
from tdq_plugin.scales.bank import BankFactory

__all__ = ["ActivationQuantizer", "Estimator", "QuantizerMode", "dynamic_range"]

Estimator = Literal["lsq", "pact", "nipq"]
QuantizerMode = Literal["quantize", "observe", "off", "dynamic"]
_OPTIONS = {"estimator": get_args(Estimator), "mode": get_args(QuantizerMode)}


class ActivationQuantizer(nn.Module):
    """Fake quantization of one activation, by a scale that a scale bank gives.

    Args:
        grid: The integer codes.

    Attributes:
        name: Its row in the scale bank; set by `tdq_plugin.attach`.
        bank: The scale bank that the framework's configuration asks for, if it does.
        mode: `quantize` by the given scale, `observe` and pass `x` through, `off`, or `dynamic`:
            ignore the given scale and take each sample's own minimum and maximum (the
            input-dependent baseline).
        estimator: How training sees the rounding: `lsq` and `pact` round and estimate the scale's
            gradient (see `fake_quantize`), `nipq` adds noise instead while the module is in
            training mode (see `pseudo_quantize`). In evaluation all three round.
        observed: Activations seen in mode `observe` since they were last taken away.

    Raises:
        ConfigError: `mode` or `estimator` is set to none of these words.
    """

    def __init__(self, grid: QuantizationGrid) -> None:
        super().__init__()
        self.grid = grid
        self.name: str | None = None
        self.bank: BankFactory | None = None
        self.mode: QuantizerMode = "quantize"
        self.estimator: Estimator = "lsq"
        self.observed: list[Tensor] = []

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; a word that is none of the options would train or round as another."""
        if name in _OPTIONS:
            check_option(name, value, _OPTIONS[name])
        super().__setattr__(name, value)

    def forward(
        self, x: Tensor, scale: Tensor | None = None, zero_point: Tensor | None = None
    ) -> Tensor:
        """Quantize and dequantize `x`.

        Args:
            x: Activation, samples along dimension 0.
            scale: Shape `(B,)`.
            zero_point: Shape `(B,)`.

        Raises:
            AdapterError: No scale was given, so the model is not attached to a scale bank.
        """
        if self.mode == "off":
            return x
        if self.mode == "observe":
            # A copy, for the model may go on to change `x` in place.
            self.observed.append(x.detach().clone())
            return x
        if self.mode == "dynamic":
            scale, zero_point = dynamic_range(x, self.grid)
        if scale is None or zero_point is None:
            raise AdapterError(
                "An activation quantizer was called without a scale. "
                "Call tdq_plugin.attach(model) after the framework's prepare step."
            )
        if self.estimator == "nipq" and self.training:
            codes = self.grid.quant_min, self.grid.quant_max
            return pseudo_quantize(x, scale, zero_point, *codes)
        gradient: StepGradient = "pact" if self.estimator == "pact" else "lsq"
        return self.round(x, scale, zero_point, gradient)

    def round(self, x: Tensor, scale: Tensor, zero_point: Tensor, gradient: StepGradient) -> Tensor:
        """`fake_quantize` on the grid; a framework that rounds in its own way overrides it."""
        codes = self.grid.quant_min, self.grid.quant_max
        return fake_quantize(x, scale, zero_point, *codes, gradient)

    def require_quantizing(self, product: str) -> None:
        """Check that this quantizer rounds by its scale, before it becomes part of something.

        Args:
            product: What that is, for the message.

        Raises:
            AdapterError: It is switched off, observes, or is dynamic.
        """
        if self.mode != "quantize":
            raise AdapterError(
                f"The quantizer {self.name!r} is in mode {self.mode!r}, so the {product} would "
                "differ from the model. Set its mode to 'quantize'."
            )


def dynamic_range(x: Tensor, grid: QuantizationGrid) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each sample from its own limits, float32, shape `(B,)` each."""
    flat = x.detach().float().reshape(x.shape[0], -1)
    low, high = flat.amin(dim=1).clamp(max=0), flat.amax(dim=1).clamp(min=0)
    return affine_range(low, high, grid)
