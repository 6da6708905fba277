"""Evaluation mode for a while."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress

from torch import nn

__all__ = ["evaluation_mode"]


@contextmanager
def evaluation_mode(model: object) -> Iterator[None]:
    """Within the block, dropout and batch statistics are those of evaluation.

    Each module's own flag comes back afterwards, also where parts of a model differ.

    Args:
        model: What is no module, such as a function or None, stays as it is.

    Example:
        >>> model = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
        >>> with evaluation_mode(model):
        ...     model[0].training
        False
        >>> model[0].training, model[1].training
        (True, False)
    """
    if not isinstance(model, nn.Module):
        yield
        return
    training = {module: module.training for module in model.modules()}
    # Exported graphs switch operators in it, not only flags; converted ones refuse, as they have
    # one mode.
    try:
        with suppress(NotImplementedError):
            model.eval()
        yield
    finally:
        with suppress(NotImplementedError):
            model.train(training[model])
        for module, was_training in training.items():
            module.training = was_training
