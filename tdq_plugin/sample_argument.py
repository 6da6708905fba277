"""Which of a model's arguments is the sample; the others beside the timestep are conditions."""

from collections.abc import Iterable

__all__ = ["SAMPLE_NAMES", "find_sample_argument"]

# What diffusers and others call it.
SAMPLE_NAMES = ("sample", "hidden_states", "latents", "x")


def find_sample_argument(names: Iterable[str]) -> str | None:
    """Find the sample by its usual names, or take the first argument.

    Args:
        names: The model's arguments in their order, without the timestep.

    Returns:
        The first that is one of `SAMPLE_NAMES`, the very first if none is, None if there is none.

    Example:
        >>> find_sample_argument(["class_labels", "sample"])
        'sample'
        >>> find_sample_argument(["noisy", "class_labels"])
        'noisy'
    """
    names = list(names)
    return next((name for name in names if name in SAMPLE_NAMES), next(iter(names), None))
