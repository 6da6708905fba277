"""What a training step sees: noisy inputs, their timesteps, and the output that is wanted.

Every draw is a function of the seed, the step and the place in the global batch. So a restart is
exact, and the number of processes that share a batch does not matter.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from tdq_plugin.model_output import first_tensor
from tdq_plugin.recipes.evaluation.sampling import Denoiser
from tdq_plugin.reconstruct import CalibrationSet

__all__ = [
    "Batch",
    "BatchMemory",
    "Drawn",
    "FloatTrajectories",
    "Inputs",
    "NoisedImages",
    "Objective",
    "ObjectiveName",
    "WeightingName",
    "weighting_of",
]

ObjectiveName = Literal["noise", "distillation", "data_free_distillation"]
WeightingName = Literal["uniform", "noise_share", "min_snr"]


class Batch(NamedTuple):
    """Noisy samples `(B, C, H, W)`, timesteps `(B,)`, and the wanted output like the samples."""

    samples: Tensor
    timesteps: Tensor
    target: Tensor


class Drawn(NamedTuple):
    """Noisy samples, timesteps, and the noise that is in the samples, where it is known."""

    samples: Tensor
    timesteps: Tensor
    noise: Tensor | None


class Inputs(Protocol):
    """Draws one process's part of the global batch of a step."""

    def draw(self, step: int, part: slice) -> Drawn: ...


class Source(Protocol):
    """Samples `(N, C, H, W)` by their numbers `(N,)`: a tensor, or what reads files."""

    def __len__(self) -> int: ...

    def __getitem__(self, indices: Tensor, /) -> Tensor: ...


@dataclass(frozen=True)
class NoisedImages:
    """Images with noise of a random timestep.

    Attributes:
        images: The clean samples.
        scheduler: The diffusion process.
        batch_size: Of the global batch.
        seed: Of all draws.
        flip: Mirror half of the images.
        encode: From images to what the denoiser sees, where the two differ.
    """

    images: Source
    scheduler: DDIMScheduler
    batch_size: int
    seed: int
    flip: bool = False
    encode: Callable[[Tensor], Tensor] | None = None

    def draw(self, step: int, part: slice) -> Drawn:
        generator = _generator(self.seed, step)
        index = torch.randint(len(self.images), (self.batch_size,), generator=generator)
        steps = self.scheduler.config.num_train_timesteps
        timesteps = torch.randint(steps, (self.batch_size,), generator=generator)[part]
        mirrored = torch.rand(self.batch_size, generator=generator)[part] < 0.5
        clean = self.images[index[part]]
        if self.flip:
            clean = torch.where(mirrored[:, None, None, None], clean.flip(-1), clean)
        if self.encode:
            clean = self.encode(clean)
        noise = torch.randn(self.batch_size, *clean.shape[1:], generator=generator)[part]
        return Drawn(self.scheduler.add_noise(clean, noise, timesteps), timesteps, noise)


@dataclass(frozen=True)
class FloatTrajectories:
    """What the float model itself meets while it samples (as EfficientDM, arXiv 2310.03270).

    No data are needed: the trajectories start from noise.

    Attributes:
        points: Of the trajectories.
        batch_size: Of the global batch.
        seed: Of all draws.
    """

    points: CalibrationSet
    batch_size: int
    seed: int

    def draw(self, step: int, part: slice) -> Drawn:
        generator = _generator(self.seed, step)
        index = torch.randint(len(self.points), (self.batch_size,), generator=generator)[part]
        return Drawn(self.points.samples[index], self.points.timesteps[index], None)


class BatchMemory:
    """Keeps the first batches for the methods that are trained on the same ones later.

    Their targets are a forward pass of the float model, a sixth of a training step.

    Args:
        byte_budget: Batches beyond it are made anew each time.
    """

    def __init__(self, byte_budget: int = 2**28) -> None:
        self._batches: dict[int, Batch] = {}
        self._bytes_left = byte_budget

    def get(self, step: int, make: Callable[[], Batch]) -> Batch:
        """The batch of a step, from `make` if it is not kept."""
        batch = self._batches.get(step) or make()
        size = sum(tensor.nbytes for tensor in batch)
        if step not in self._batches and size <= self._bytes_left:
            self._batches[step] = batch
            self._bytes_left -= size
        return batch


@dataclass(frozen=True)
class Objective:
    """The loss of the quantized model.

    Attributes:
        inputs: Where samples come from.
        teacher: The float model whose output is wanted; None: the noise itself, which is the
            loss of DDPM (Ho et al., arXiv 2006.11239, eq. 14).
        weighting: From timesteps `(B,)` to weights of the samples' losses `(B,)`; by default 1.
        absolute: Mean absolute instead of squared error, as LDM trains.
        memory: Where batches are kept, if several methods are trained on them; each of their
            processes then computes the same part of a batch on the same device every time.
    """

    inputs: Inputs
    teacher: Denoiser | None = None
    weighting: Callable[[Tensor], Tensor] | None = None
    absolute: bool = False
    memory: BatchMemory | None = None

    def batch(self, step: int, part: slice, device: torch.device | str = "cpu") -> Batch:
        """One process's part of the batch of a step."""
        if self.memory is None:
            return self._make(step, part, device)
        return self.memory.get(step, lambda: self._make(step, part, device))

    @torch.no_grad()
    def _make(self, step: int, part: slice, device: torch.device | str) -> Batch:
        drawn = self.inputs.draw(step, part)
        samples, timesteps = drawn.samples.to(device), drawn.timesteps.to(device)
        if self.teacher is not None:
            return Batch(samples, timesteps, self.teacher(samples, timesteps))
        assert drawn.noise is not None
        return Batch(samples, timesteps, drawn.noise.to(device))

    def loss(self, model: Callable[..., Any], batch: Batch) -> Tensor:
        """Mean error over the batch, shape `()`; models may return a tuple or output object."""
        error = first_tensor(model(batch.samples, batch.timesteps)) - batch.target
        error = error.abs() if self.absolute else error.square()
        if self.weighting is None:
            return error.mean()
        return (error.flatten(1).mean(dim=1) * self.weighting(batch.timesteps)).mean()


def weighting_of(
    name: WeightingName, scheduler: DDIMScheduler
) -> Callable[[Tensor], Tensor] | None:
    """From timesteps to weights of the losses of noise predictions; None for `uniform`.

    Without a weighting, the timesteps near 0 dominate, where the error of the noise is largest and
    matters least for the image. `noise_share` is sqrt(1 - alpha_t). `min_snr` is min(SNR, 5) / SNR
    (Hang et al., arXiv 2303.09556): it comes near to equal losses at all timesteps.
    """
    if name == "uniform":
        return None
    weights = (1 - scheduler.alphas_cumprod).sqrt()
    if name == "min_snr":
        snr = scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod)
        weights = snr.clamp(max=5.0) / snr
    return lambda timesteps: weights.to(timesteps.device)[timesteps.round().long()]


def _generator(seed: int, step: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + step)
