"""How much a model's activations move with the timestep."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from tdq_plugin.errors import CalibrationError

__all__ = ["RatioSummary", "TemporalDynamics", "temporal_dynamics"]


@dataclass(frozen=True)
class RatioSummary:
    """One ratio per layer, largest over smallest value over the timesteps, and its distribution.

    Attributes:
        per_layer: The ratio of every layer, at least 1.
        median: Median over the layers.
        p90: 90th percentile over the layers.
        maximum: Largest of the layers.
    """

    per_layer: tuple[float, ...]
    median: float
    p90: float
    maximum: float


@dataclass(frozen=True)
class TemporalDynamics:
    """Whether there is something to win with timestep-dependent scales.

    Attributes:
        layers: Number of layers L.
        timesteps: Number of timesteps T.
        std_ratio: Movement of the standard deviation.
        range_ratio: Movement of the range.
        correlation: |Pearson r| of t and the standard deviation of every layer.
        share_correlated_0_5: Share of layers where it is over 0.5.
        share_correlated_0_7: The same over 0.7.
    """

    layers: int
    timesteps: int
    std_ratio: RatioSummary
    range_ratio: RatioSummary
    correlation: tuple[float, ...]
    share_correlated_0_5: float
    share_correlated_0_7: float

    def as_dict(self) -> dict[str, Any]:
        """Return plain numbers, lists and dicts, as `report.json` wants them."""
        return asdict(self)


def temporal_dynamics(timesteps: Tensor, std: Tensor, ranges: Tensor) -> TemporalDynamics:
    """Summarize per-layer, per-timestep statistics.

    So et al., "Temporal Dynamic Quantization for Diffusion Models" (2023), motivate the method
    with the correlation; the ratios say whether the movement is also large.

    Args:
        timesteps: `(T,)`, at least two different values.
        std: Standard deviation of each layer's activations at each timestep, `(L, T)`.
        ranges: A high percentile of their magnitude, `(L, T)`.

    Raises:
        CalibrationError: Shapes do not fit, or a statistic is not positive and finite.

    Example:
        >>> t = torch.tensor([0.0, 500.0, 999.0])
        >>> moving, still = [1.0, 1.5, 2.0], [1.0, 1.0, 1.0]
        >>> dynamics = temporal_dynamics(t, torch.tensor([moving, still]), torch.ones(2, 3))
        >>> dynamics.std_ratio.maximum, dynamics.share_correlated_0_5
        (2.0, 0.5)
    """
    timesteps = timesteps.double()
    if len(set(timesteps.tolist())) < 2:
        raise CalibrationError(f"Dynamics need two different timesteps, got {timesteps.tolist()}.")
    for name, statistic in {"std": std, "ranges": ranges}.items():
        _check(name, statistic, timesteps)
    correlation = _correlation(timesteps, std.double()).abs()
    return TemporalDynamics(
        layers=len(std),
        timesteps=len(timesteps),
        std_ratio=_ratio(std),
        range_ratio=_ratio(ranges),
        correlation=tuple(correlation.tolist()),
        share_correlated_0_5=(correlation > 0.5).double().mean().item(),
        share_correlated_0_7=(correlation > 0.7).double().mean().item(),
    )


def _check(name: str, statistic: Tensor, timesteps: Tensor) -> None:
    if statistic.dim() != 2 or statistic.shape[1] != len(timesteps) or not len(statistic):
        raise CalibrationError(
            f"{name} has shape {tuple(statistic.shape)}; "
            f"(layers, {len(timesteps)}) is needed for {len(timesteps)} timesteps."
        )
    for layer, column in (~(statistic.isfinite() & (statistic > 0))).nonzero().tolist():
        raise CalibrationError(
            f"{name} of layer {layer} at t = {timesteps[column]:g} is "
            f"{statistic[layer, column]:g}; leave out layers whose activations are constant "
            "or not finite."
        )


def _ratio(statistic: Tensor) -> RatioSummary:
    statistic = statistic.double()
    ratio = statistic.amax(dim=1) / statistic.amin(dim=1)
    return RatioSummary(
        per_layer=tuple(ratio.tolist()),
        median=ratio.quantile(0.5).item(),
        p90=ratio.quantile(0.9).item(),
        maximum=ratio.max().item(),
    )


def _correlation(timesteps: Tensor, std: Tensor) -> Tensor:
    """Pearson's r of `(T,)` with every row of `(L, T)`; 0 for a row that does not move."""
    moves = std.amax(dim=1) > std.amin(dim=1)
    centred_t = timesteps - timesteps.mean()
    centred = std - std.mean(dim=1, keepdim=True)
    norm = centred_t.norm() * centred.norm(dim=1)
    return torch.where(moves, centred @ centred_t / norm.clamp_min(1e-300), 0.0)
