"""The scale bank: the one module of a quantized model that sees the timestep."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from tdq_plugin.errors import CalibrationError, ScaleError
from tdq_plugin.fake_quantize import clamp_projected, round_straight_through
from tdq_plugin.float32 import Float32Module
from tdq_plugin.grid import QuantizationGrid
from tdq_plugin.options import check_option
from tdq_plugin.timestep import as_timesteps

__all__ = [
    "SCALE_FLOOR",
    "BankFactory",
    "Output",
    "ScaleBank",
    "TrainableBank",
    "inverse_softplus",
]

SCALE_FLOOR = 1e-12
Output = Literal["exponential", "softplus"]


class ScaleBank(Float32Module, ABC):
    """Scales and zero points of all L activation quantizers of a model, as functions of t.

    Args:
        grids: The grid of each quantizer by its name; the order is the row order.

    Attributes:
        names: Names of the quantizers, in row order.
        grids: Their grids, in row order.
    """

    def __init__(self, grids: Mapping[str, QuantizationGrid]) -> None:
        super().__init__()
        self.names = tuple(grids)
        self.grids = tuple(grids.values())

    def forward(self, timestep: Tensor | float) -> tuple[Tensor, Tensor]:
        """Evaluate all rows.

        Args:
            timestep: As `as_timesteps` takes it; B values.

        Returns:
            Scales and zero points (integer valued), both float32 of shape `(L, B)`.
        """
        return self.rows(as_timesteps(timestep, self.device))

    @abstractmethod
    def rows(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """As `forward`, for timesteps that are already a float32 tensor of shape `(B,)`."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the bank lives."""


class TrainableBank(ScaleBank):
    """A bank whose rows are learned, relative to a static scale per quantizer.

    With the exponential output, `s(t) = s0 * exp(curve(t))`; with softplus,
    `s(t) = softplus(curve(t) + softplus^-1(s0))`. A curve of zero gives `s0` for every t.

    Args:
        grids: The grid of each quantizer by its name.
        output: How a curve becomes a positive scale.
        timestep_zero_point: Let the zero point move with t, too.

    Raises:
        ConfigError: There is no such output.
    """

    base_scale: Tensor
    limits: Tensor
    symmetric: Tensor

    def __init__(
        self,
        grids: Mapping[str, QuantizationGrid],
        output: Output = "exponential",
        timestep_zero_point: bool = False,
    ) -> None:
        super().__init__(grids)
        check_option("output", output, get_args(Output))
        self.output = output
        self.timestep_zero_point = timestep_zero_point
        rows = len(self.names)
        self.register_buffer("base_scale", torch.full((rows, 1), torch.nan))
        self.zero_point = nn.Parameter(torch.zeros(rows, 1))
        codes = [[grid.quant_min, grid.quant_max] for grid in self.grids]
        limits = torch.tensor(codes, dtype=torch.float32).reshape(rows, 2)
        symmetric = torch.tensor([[grid.symmetric] for grid in self.grids], dtype=torch.bool)
        self.register_buffer("limits", limits, persistent=False)
        self.register_buffer("symmetric", symmetric.reshape(rows, 1), persistent=False)
        self._calibrated = False

    @property
    def device(self) -> torch.device:
        return self.base_scale.device

    @property
    def curves_per_row(self) -> int:
        """2 where the zero point has a curve of its own, else 1."""
        return 2 if self.timestep_zero_point else 1

    @abstractmethod
    def curves(self, timesteps: Tensor) -> Tensor:
        """Shape `(L, B, curves_per_row)`: the scale's curve, then the zero point's, in steps."""

    @abstractmethod
    def fit(self, timesteps: Tensor, curves: Tensor) -> None:
        """Set the parameters so that `curves(timesteps)` comes near the given values.

        Args:
            timesteps: Shape `(T,)`.
            curves: Shape `(L, T, curves_per_row)`.
        """

    def rows(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        self._require_calibration()
        curves = self.curves(timesteps)
        scale = self._positive(curves[..., 0]).clamp(min=SCALE_FLOOR)
        offset = curves[..., 1] if self.timestep_zero_point else torch.zeros_like(scale)
        zero_point = (self.zero_point + offset).masked_fill(self.symmetric, 0.0)
        zero_point = clamp_projected(zero_point, self.limits[:, :1], self.limits[:, 1:])
        return scale, round_straight_through(zero_point)

    def set_static(self, scale: Tensor, zero_point: Tensor) -> None:
        """Set the static scale s0 and the zero point of every quantizer.

        Args:
            scale: Positive, shape `(L,)`.
            zero_point: In steps, shape `(L,)`.

        Raises:
            ScaleError: A scale is not finite or not positive; the message names the quantizer.
        """
        for name, value in zip(self.names, scale.tolist(), strict=True):
            if not 0 < value < float("inf"):
                raise ScaleError(f"The static scale of {name!r} is {value}; it must be positive.")
        with torch.no_grad():
            self.base_scale.copy_(scale.reshape(-1, 1).clamp(min=SCALE_FLOOR))
            self.zero_point.copy_(zero_point.reshape(-1, 1))

    def warm_start(self, timesteps: Tensor, scales: Tensor, zero_points: Tensor) -> None:
        """Start from scales that were observed at some timesteps (`set_static` comes first).

        Args:
            timesteps: Shape `(T,)`.
            scales: Shape `(L, T)`.
            zero_points: Shape `(L, T)`; used where the zero point moves with t.
        """
        self._require_calibration()
        curves = [self._inverse(scales.to(self.device).clamp(min=SCALE_FLOOR))]
        if self.timestep_zero_point:
            curves.append(zero_points.to(self.device) - self.zero_point.detach())
        self.fit(timesteps.to(self.device), torch.stack(curves, dim=-1))

    def extra_repr(self) -> str:
        """What a printed model shows of the bank."""
        return (
            f"{len(self.names)} quantizers, output={self.output!r}, "
            f"timestep_zero_point={self.timestep_zero_point}"
        )

    def _positive(self, curve: Tensor) -> Tensor:
        if self.output == "exponential":
            return self.base_scale * curve.exp()
        return nn.functional.softplus(curve + inverse_softplus(self.base_scale))

    def _inverse(self, scales: Tensor) -> Tensor:
        if self.output == "exponential":
            return (scales / self.base_scale).log()
        return inverse_softplus(scales) - inverse_softplus(self.base_scale)

    def _require_calibration(self) -> None:
        if self._calibrated:
            return
        if torch.compiler.is_compiling():
            calibrated = ~self.base_scale.isnan().any()
            torch._assert_async(calibrated, "Some quantizers have no scale yet: calibrate first.")
            return
        missing = [n for n, s in zip(self.names, self.base_scale.isnan(), strict=True) if s]
        if missing:
            raise CalibrationError(
                f"{len(missing)} of {len(self.names)} quantizers have no scale yet, the first is "
                f"{missing[0]!r}. Run tdq_plugin.calibrate, or load a state dict."
            )
        self._calibrated = True

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._calibrated = False
        super()._load_from_state_dict(*args, **kwargs)


BankFactory = Callable[[Mapping[str, QuantizationGrid]], TrainableBank]


def inverse_softplus(value: Tensor) -> Tensor:
    """`x` with `softplus(x) = value`, exact in float32 for tiny and for large values."""
    return value + torch.log(-torch.expm1(-value))
