"""The output correction: offsets of the predicted noise, one for each timestep of a sampler."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tdq_plugin.errors import LookupRuleError, ScaleError, TableFormatError
from tdq_plugin.files import atomic_file
from tdq_plugin.float32 import Float32Module
from tdq_plugin.timestep import as_timesteps

__all__ = ["CorrectedDenoiser", "OutputCorrection", "load_correction"]

FORMAT_VERSION = 1
_METADATA = {"format": "tdq-output-correction", "version": str(FORMAT_VERSION)}


class OutputCorrection(Float32Module):
    """Offsets that are added to the predicted noise, one for each timestep of a sampler.

    Args:
        timesteps: Ascending, shape `(S,)`.
        offsets: Shape `(S, C, H, W)`.

    Raises:
        ScaleError: The shapes do not fit together, the timesteps do not ascend, or an offset is
            not finite.

    Example:
        >>> correction = OutputCorrection(torch.tensor([0.0, 500.0]), torch.ones(2, 1, 4, 4))
        >>> correction(torch.zeros(3, 1, 4, 4), 500).mean()
        tensor(1.)
    """

    timesteps: Tensor
    offsets: Tensor

    def __init__(self, timesteps: Tensor, offsets: Tensor) -> None:
        super().__init__()
        if timesteps.dim() != 1 or len(timesteps) != len(offsets) or len(offsets) == 0:
            raise ScaleError(
                f"{tuple(timesteps.shape)} timesteps and offsets {tuple(offsets.shape)}: there is "
                "one offset for each timestep."
            )
        if not bool((timesteps.diff() > 0).all()) or not bool(offsets.isfinite().all()):
            raise ScaleError("The timesteps of a correction ascend and its offsets are finite.")
        self.register_buffer("timesteps", timesteps.float())
        self.register_buffer("offsets", offsets.float())

    def forward(self, output: Tensor, timestep: Tensor | float) -> Tensor:
        """The corrected output, shape `(B, C, H, W)`; one timestep, or one for each sample.

        Raises:
            LookupRuleError: The correction was not fitted for a timestep.
            ScaleError: The output has another shape, or not as many samples as there are timesteps.
        """
        wanted = as_timesteps(timestep, self.timesteps.device)
        row = torch.searchsorted(self.timesteps, wanted).clamp(max=len(self.timesteps) - 1)
        known = self.timesteps[row] == wanted
        if not bool(known.all()):
            raise LookupRuleError(
                f"The output correction has no timestep {wanted[~known].tolist()[:5]}; it was "
                f"fitted for {self.timesteps.tolist()}. Fit one for this sampler."
            )
        offsets = self.offsets[row]
        if output.shape[1:] != offsets.shape[1:] or len(offsets) not in (1, len(output)):
            raise ScaleError(
                f"Offsets of shape {tuple(offsets.shape)} were added to an output of shape "
                f"{tuple(output.shape)}. Give one timestep, or one for each sample, and fit a "
                "correction for this size."
            )
        return output + offsets.to(output.dtype)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, atomically."""
        tensors = {key: value.contiguous() for key, value in self.state_dict().items()}
        with atomic_file(path) as temporary:
            save_file(tensors, temporary, _METADATA)


def load_correction(path: str | Path) -> OutputCorrection:
    """Read what `OutputCorrection.save` wrote.

    Raises:
        TableFormatError: The file is missing, truncated, no correction, or of an unknown version.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata, keys = file.metadata() or {}, set(file.keys())
            if metadata != _METADATA or keys != {"timesteps", "offsets"}:
                raise TableFormatError(
                    f"{path} holds {sorted(keys)} with the metadata {json.dumps(metadata)}; "
                    f"an output correction of version {FORMAT_VERSION} is expected."
                )
            return OutputCorrection(file.get_tensor("timesteps"), file.get_tensor("offsets"))
    except (SafetensorError, OSError) as error:
        raise TableFormatError(f"{path} is not a readable safetensors file: {error}.") from error


class CorrectedDenoiser(nn.Module):
    """A denoiser with its correction, usable in the denoiser's place in a diffusers pipeline.

    Args:
        model: Called as `model(sample, timestep, ...)`; returns a tensor, a tuple that starts
            with it, or a diffusers output with the field `sample`.
        correction: For the timesteps of the sampler.
    """

    def __init__(self, model: Callable[..., Any], correction: OutputCorrection) -> None:
        super().__init__()
        self.model, self.correction = model, correction

    def forward(self, sample: Tensor, timestep: Any, *args: Any, **kwargs: Any) -> Any:
        """The model's output in the model's form, corrected."""
        output = self.model(sample, timestep, *args, **kwargs)
        if isinstance(output, Tensor):
            return self.correction(output, timestep)
        if isinstance(output, tuple):
            return (self.correction(output[0], timestep), *output[1:])
        output.sample = self.correction(output.sample, timestep)
        return output

    @property
    def config(self) -> Any:
        """The model's configuration, which pipelines read the image size from."""
        return self.model.config  # type: ignore[attr-defined]

    @property
    def dtype(self) -> torch.dtype:
        """The type of the samples."""
        return getattr(self.model, "dtype", self.correction.offsets.dtype)

    @property
    def device(self) -> torch.device:
        """Where the samples live."""
        return getattr(self.model, "device", self.correction.offsets.device)
