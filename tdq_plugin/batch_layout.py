"""Whether activations hold their samples along dimension 0, as a scale for each sample assumes.

Nothing in a tensor tells. But if the samples of a batch change places, activations that lie
batch-major change places in the same way, and others do not.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from tdq_plugin.errors import CalibrationError

__all__ = ["check_layout", "fingerprints", "has_samples", "holds_samples", "next_places"]


def fingerprints(x: Tensor, samples: int) -> Tensor:
    """One number for each of the equal parts along dimension 0, shape `(samples,)`.

    Parts with the same values in another order have other numbers.

    Example:
        >>> x = torch.tensor([[1.0, 2.0], [2.0, 1.0]])
        >>> first, second = fingerprints(x, 2)
        >>> bool(first == second)
        False
    """
    parts = x.detach().float().reshape(samples, -1)
    return parts @ torch.arange(parts.shape[1], device=x.device).cos()


def has_samples(value: Any, samples: int) -> bool:
    """Whether a value is a tensor with so many rows, one for each sample of a batch."""
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == samples


def holds_samples(arguments: Any, samples: int) -> bool:
    """Whether a model's arguments have a tensor with more than t for each of so many samples."""
    return any(has_samples(leaf, samples) and leaf.dim() > 1 for leaf in tree_leaves(arguments))


def next_places(arguments: Any, samples: int) -> Any:
    """Move every sample one place on, the last to the front, in all tensors of samples."""
    return tree_map(lambda leaf: leaf.roll(1, 0) if has_samples(leaf, samples) else leaf, arguments)


def check_layout(
    before: Mapping[str, Sequence[Tensor]], after: Mapping[str, Sequence[Tensor]]
) -> None:
    """Compare fingerprints of a batch with those of `next_places` of it.

    Args:
        before: By quantizer, of each of its calls.
        after: The same, of the moved batch.

    Raises:
        CalibrationError: The samples of a quantizer have not moved one place on.
    """
    for name, calls in before.items():
        for first, second in zip(calls, after[name], strict=True):
            expected = first.roll(1)
            # Kernels may round a sample in another place a little differently.
            allowed = 0.1 * (first - expected).norm() + 1e-3 * first.norm()
            if (second - expected).norm() > allowed:
                raise CalibrationError(
                    f"The input of {name!r} does not hold the {len(first)} samples of the batch "
                    "one after the other along dimension 0, so each would be rounded by the scale "
                    "of another's timestep. Let the layer see the samples first (layers on "
                    "(length, batch, features), and nn.MultiheadAttention inside, do not), or let "
                    "it stay float: float_layers=[...]. Or give t as one number in every batch, "
                    "in calibration and in training."
                )
