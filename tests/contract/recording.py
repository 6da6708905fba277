"""What went into every quantizer of a model, and what came out."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor, nn

import tdq_plugin as tdq

__all__ = ["Call", "recorded_calls"]


class Call(NamedTuple):
    """One call of an activation quantizer."""

    x: Tensor
    scale: Tensor
    zero_point: Tensor
    output: Tensor


@contextmanager
def recorded_calls(model: nn.Module) -> Iterator[dict[str, Call]]:
    """The last call of every activation quantizer of an attached model, by name."""
    calls: dict[str, Call] = {}

    def record(name):
        def hook(module, args, output):
            calls[name] = Call(*(value.detach() for value in (*args, output)))

        return hook

    handles = [
        quantizer.register_forward_hook(record(name))
        for name, quantizer in tdq.named_quantizers(model)
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
