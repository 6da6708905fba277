"""Pseudo-quantization: noise in the place of rounding, so that the gradient needs no estimate."""

import torch
from torch import Tensor

from tdq_plugin.fake_quantize import per_sample

__all__ = ["pseudo_quantize"]


def pseudo_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int
) -> Tensor:
    """NIPQ's training-time quantizer: clip, and add rounding noise to what is inside the range.

    Shin et al., "NIPQ: Noise Proxy-Based Integrated Pseudo-Quantization", CVPR 2023 (arXiv
    2306.00820). As in its released code, the noise is drawn from the rounding errors that the
    values inside the range do have, which need not be uniform: `x + scale * noise`. So the
    gradient of `scale` is the noise inside the range and the limit's code outside. NIPQ rounds
    in evaluation; `fake_quantize` does that.

    Args:
        x: Float tensor, samples along dimension 0.
        scale: As for `fake_quantize`.
        zero_point: As for `fake_quantize`.
        quant_min: Smallest code.
        quant_max: Largest code.

    Returns:
        Tensor like `x`. The noise comes from torch's global generator.

    Example:
        >>> x = torch.tensor([[0.24], [9.0]])
        >>> pseudo_quantize(x, torch.tensor(0.1), torch.tensor(0.0), 0, 15)
        tensor([[0.2000],
                [1.5000]])
    """
    step, zero = per_sample(scale, x), per_sample(zero_point, x)
    low, high = (quant_min - zero) * step, (quant_max - zero) * step
    wide = x.to(step.dtype)
    inside = (wide > low) & (wide < high)
    noisy = wide + _rounding_noise(wide.detach() / step.detach(), inside) * step
    clipped = torch.where(wide >= high, high, low)
    return torch.where(inside, noisy, clipped).to(x.dtype)


def _rounding_noise(steps: Tensor, inside: Tensor) -> Tensor:
    """As many rounding errors as there are values, drawn with replacement from those inside."""
    errors = (steps.round() - steps)[inside]
    if errors.numel() == 0:
        return torch.zeros_like(steps)
    index = torch.randint(errors.numel(), (steps.numel(),), device=steps.device)
    return errors[index].reshape(steps.shape)
