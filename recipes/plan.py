"""What `--dry-run` prints: the plan of a run, its steps and the memory that it needs."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["Memory", "Plan", "parameter_bytes", "training_memory"]


@dataclass(frozen=True)
class Plan:
    """A title, and what is worth knowing before a run starts.

    Example:
        >>> print(Plan("tdq run mine", {"bits": "W4A4", "steps": "400"}))
        tdq run mine
          bits   W4A4
          steps  400
    """

    title: str
    lines: dict[str, str]

    def __str__(self) -> str:
        width = max(len(label) for label in self.lines)
        return "\n".join(
            [self.title, *(f"  {label:<{width}}  {text}" for label, text in self.lines.items())]
        )


@dataclass(frozen=True)
class Memory:
    """Estimated bytes of a training process.

    Attributes:
        state: Parameters, their gradients, Adam's two moments, the average; what the backward pass
            needs of the weights; and models that stay in memory beside the trained one.
        activations: What the backward pass needs of each sample.
    """

    state: int
    activations: int

    def describe(self, batch_size: int) -> str:
        """In gigabytes, for so many samples in a process."""
        total = self.state + batch_size * self.activations
        return (
            f"{total / 1e9:.2f} GB: {self.state / 1e9:.2f} for parameters and optimizer, "
            f"{self.activations / 1e6:.1f} MB for each of {batch_size} samples, which processes "
            "share"
        )


def parameter_bytes(model: nn.Module) -> int:
    """Size of a model's parameters."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def training_memory(
    model: nn.Module, samples: Tensor, timesteps: Tensor, beside: int = 0
) -> Memory:
    """Estimate the memory of training from two forward passes.

    Args:
        model: A calibrated quantized model.
        samples: Two of them, shape `(2, C, H, W)`.
        timesteps: Shape `(2,)`.
        beside: Bytes of models that stay in memory beside it.
    """
    parameters = parameter_bytes(model)
    one = _saved_bytes(model, samples[:1].clone(), timesteps[:1].clone())
    activations = _saved_bytes(model, samples, timesteps) - one
    return Memory(5 * parameters + beside + one - activations, activations)


def _saved_bytes(model: nn.Module, samples: Tensor, timesteps: Tensor) -> int:
    """Bytes that one forward pass keeps for the backward pass, besides the model itself."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        # Kept alive, the graph keeps what it saved: no address is used twice.
        output = model.train()(samples, timesteps)
    del output
    return sum(saved.values())
