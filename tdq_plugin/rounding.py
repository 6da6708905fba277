"""Learned rounding of weights: AdaRound (Nagel et al., arXiv 2004.10568, eq. 22 to 25)."""

from collections.abc import Collection

import torch
from torch import Tensor, nn

from tdq_plugin.fake_quantize import per_sample
from tdq_plugin.weights import WeightQuantizer

__all__ = ["LearnedRounding", "rounding_penalty"]

ZETA, GAMMA = 1.1, -0.1
FIRST_BETA, LAST_BETA = 20.0, 2.0
WARM_UP = 0.2


class LearnedRounding(nn.Module):
    """Takes the place of a weight quantizer while its rounding is learned.

    The weight becomes `scale * clip(floor(weight / scale) + h(v))`, where `h`, the rectified
    sigmoid, says how far each weight is rounded up, and codes are clipped with their zero point.
    At the start that is the weight itself, clipped to the range of the codes.

    Args:
        quantizer: Its ranges are used; they stay as they are.
        weight: The weight to round, shape `(output channels, ...)`.

    Attributes:
        v: Learned, float32, shaped as the weight.
        hard: Whether `h` is 0 or 1, which is how training ends.

    Example:
        >>> from tdq_plugin.grid import weight_grid
        >>> quantizer = WeightQuantizer(weight_grid(4))
        >>> quantizer.set_scale(torch.tensor([0.5]))
        >>> weight = torch.tensor([[0.6, 0.9]])
        >>> rounding = LearnedRounding(quantizer, weight)
        >>> rounding(weight).detach()
        tensor([[0.6000, 0.9000]])
        >>> rounding.hard = True
        >>> rounding(weight)
        tensor([[0.5000, 1.0000]])
    """

    def __init__(self, quantizer: WeightQuantizer, weight: Tensor) -> None:
        super().__init__()
        self.quantizer = quantizer
        self.hard = False
        steps = weight.detach().float() / self._scale(weight)
        self.v = nn.Parameter(torch.logit((steps - steps.floor() - GAMMA) / (ZETA - GAMMA)))

    def forward(self, weight: Tensor) -> Tensor:
        """Round a weight as far as it has been learned."""
        if not self.quantizer.enabled:
            return weight
        grid, scale = self.quantizer.grid, self._scale(weight)
        zero_point = per_sample(self.quantizer.zero_point, weight)
        codes = (weight.float() / scale).floor() + self.round_up() + zero_point
        levels = codes.clamp(grid.quant_min, grid.quant_max) - zero_point
        return (levels * scale).to(weight.dtype)

    def round_up(self) -> Tensor:
        """`h(v)` between 0 and 1: how far each weight is rounded up (eq. 23)."""
        if self.hard:
            return (self.v >= 0).float()
        return (torch.sigmoid(self.v) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)

    def _scale(self, weight: Tensor) -> Tensor:
        return per_sample(self.quantizer.positive_scale().detach(), weight)


def rounding_penalty(roundings: Collection[LearnedRounding], progress: float) -> Tensor:
    """Push every `h` to 0 or 1: the mean of `1 - |2 h - 1| ** beta` (eq. 24).

    It is the mean where the paper has the sum, because reconstruction errors are relative to the
    target: neither then depends on the size of a layer.

    Args:
        roundings: At least one.
        progress: Share of the training that is done. Within the first fifth there is no penalty;
            from there `beta` falls from 20, which only moves what is nearly decided, to 2.

    Returns:
        Shape `()`.
    """
    shares = torch.cat([rounding.round_up().flatten() for rounding in roundings])
    if progress < WARM_UP:
        return shares.new_zeros(())
    beta = LAST_BETA + (FIRST_BETA - LAST_BETA) * (1 - progress) / (1 - WARM_UP)
    return (1 - (2 * shares - 1).abs() ** beta).mean()
