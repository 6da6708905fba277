"""Quantize and dequantize, with the gradients of LSQ or of PACT.

LSQ: Esser et al., arXiv 1902.08153, eq. 1 to 5. PACT: Choi et al., arXiv 1805.06085, eq. 1 to 3.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from tdq_plugin.errors import ScaleError

__all__ = [
    "StepGradient",
    "clamp_projected",
    "fake_quantize",
    "gradient_scale",
    "per_sample",
    "quantize",
    "round_straight_through",
]

StepGradient = Literal["lsq", "pact"]


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    step_gradient: StepGradient = "lsq",
) -> Tensor:
    """Round `x` to the grid: `(clip(round(x / scale) + zero_point) - zero_point) * scale`.

    The gradient of `x` is the straight-through one: 1 inside the range, 0 outside. Where a value
    is clipped to the limit `p * scale`, the gradient of `scale` is `p`. Inside the range it is the
    rounding error in steps (LSQ, eq. 3), or 0 (PACT, eq. 3, whose parameter is the limit). LSQ's
    gradients of `scale` and `zero_point` are multiplied by `gradient_scale`, PACT's are not.

    Args:
        x: Float tensor, samples along dimension 0.
        scale: Positive, shape `()` or `(B,)`; `x.shape[0]` is a multiple of B.
        zero_point: Integer valued float tensor, shape as `scale`.
        quant_min: Smallest code.
        quant_max: Largest code.
        step_gradient: Whose gradient `scale` and `zero_point` get.

    Returns:
        Tensor like `x`.

    Raises:
        ScaleError: The number of scales does not divide the leading dimension.

    Example:
        >>> x = torch.tensor([[0.24], [0.9]])
        >>> fake_quantize(x, torch.tensor([0.1, 0.5]), torch.zeros(2), 0, 15)
        tensor([[0.2000],
                [1.0000]])
    """
    step, zero = per_sample(scale, x), per_sample(zero_point, x)
    if torch.is_grad_enabled() and (x.requires_grad or step.requires_grad or zero.requires_grad):
        factor = gradient_scale(x, scale, quant_max) if step_gradient == "lsq" else 1.0
        output: Tensor = _LearnedStep.apply(  # type: ignore[no-untyped-call]
            x, step, zero, quant_min, quant_max, step_gradient, factor
        )
        return output
    return _levels(_steps(x, step), zero, quant_min, quant_max).mul_(step).to(x.dtype)


def quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int
) -> Tensor:
    """The integer codes of `x`, as a float tensor; arguments as in `fake_quantize`."""
    scale, zero_point = per_sample(scale, x), per_sample(zero_point, x)
    return _levels(_steps(x, scale), zero_point, quant_min, quant_max).add_(zero_point)


def per_sample(value: Tensor, x: Tensor) -> Tensor:
    """Shape a scale or zero point so that it broadcasts along dimension 0 of `x`.

    A leading dimension of B * k takes each value k times in a row: attention heads and frames are
    laid out batch-major.

    Raises:
        ScaleError: `value` has more than one dimension, or its length does not divide
            `x.shape[0]`.
    """
    if value.dim() > 1:
        raise ScaleError(f"A scale has shape () or (B,), not {tuple(value.shape)}.")
    if value.numel() == 1:
        return value.reshape(())
    # Not divmod: Dynamo does not know it for symbolic sizes.
    repeats, rest = x.shape[0] // value.shape[0], x.shape[0] % value.shape[0]
    if rest or repeats == 0:
        raise ScaleError(
            f"{value.shape[0]} scales cannot be spread over a leading dimension of {x.shape[0]}. "
            "Samples must lie along dimension 0, batch-major."
        )
    if repeats > 1:
        value = value.repeat_interleave(repeats)
    return value.reshape(-1, *[1] * (x.dim() - 1))


def gradient_scale(x: Tensor, scale: Tensor, quant_max: int) -> float:
    """LSQ's `1 / sqrt(N * p)`: N values share a scale, p is the largest code (section 2.2)."""
    values = x.numel() // max(scale.numel(), 1)
    return float((max(values, 1) * max(quant_max, 1)) ** -0.5)


def round_straight_through(x: Tensor) -> Tensor:
    """Round half to even; the gradient passes unchanged."""
    return x + (x.round() - x).detach()


def clamp_projected(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Clamp; a value on or outside a limit has a gradient only if that leads back inside.

    Under the gradient of `torch.clamp` a learned value that once left the range would never return.
    """
    return _ClampProjected.apply(x, low, high)  # type: ignore[no-any-return, no-untyped-call]


def _steps(x: Tensor, scale: Tensor) -> Tensor:
    # A 0-d scale would let a bfloat16 x decide the precision.
    return x.to(torch.promote_types(x.dtype, scale.dtype)) * (1 / scale)


def _levels(steps: Tensor, zero_point: Tensor, quant_min: int, quant_max: int) -> Tensor:
    # The multiplication by 1 / scale, and rounding before the zero point is added, are what
    # torch.ao's decomposed operators do: the codes are bit-equal to theirs.
    return steps.round().add_(zero_point).clamp_(quant_min, quant_max).sub_(zero_point)


class _LearnedStep(torch.autograd.Function):
    """Own formula: five times faster on CPU than torch._fake_quantize_learnable_* and exact LSQ.

    The native operator masks the gradient by the rounded code, LSQ by the value itself.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        quant_min: int,
        quant_max: int,
        step_gradient: StepGradient,
        factor: float,
    ) -> Tensor:
        steps = _steps(x, scale)
        levels = _levels(steps, zero_point, quant_min, quant_max)
        ctx.save_for_backward(steps, levels, scale, zero_point)
        ctx.quant_min, ctx.quant_max, ctx.dtype = quant_min, quant_max, x.dtype
        ctx.step_gradient, ctx.factor = step_gradient, factor
        return (levels * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        steps, levels, scale, zero_point = ctx.saved_tensors
        gradient = gradient.to(steps.dtype)
        low, high = ctx.quant_min - zero_point, ctx.quant_max - zero_point
        inside = torch.minimum(torch.maximum(steps, low), high).eq_(steps)
        gradient_x = gradient * inside
        gradient_scale_ = _dot(gradient, levels, scale)
        gradient_scale_ -= _dot(gradient_x, steps if ctx.step_gradient == "lsq" else levels, scale)
        gradient_zero = (_total(gradient_x, scale) - _total(gradient, scale)) * scale
        return (
            gradient_x.to(ctx.dtype),
            gradient_scale_ * ctx.factor,
            gradient_zero * ctx.factor,
            None,
            None,
            None,
            None,
        )


class _ClampProjected(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
        ctx.save_for_backward(x <= low, x >= high)
        return torch.minimum(torch.maximum(x, low), high)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        below, above = ctx.saved_tensors
        # A step goes against the gradient.
        outward = (below & (gradient > 0)) | (above & (gradient < 0))
        return gradient.masked_fill(outward, 0.0), None, None


def _dot(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    count = max(scale.numel(), 1)
    # Autocast would round both to bfloat16, and the difference of two such sums is lost.
    with torch.autocast(a.device.type, enabled=False):
        products: Tensor = torch.linalg.vecdot(a.reshape(count, -1), b.reshape(count, -1))
    return products.reshape(scale.shape)


def _total(a: Tensor, scale: Tensor) -> Tensor:
    return a.reshape(max(scale.numel(), 1), -1).sum(1).reshape(scale.shape)
