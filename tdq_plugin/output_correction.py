"""The output correction: gains and an offset of the predicted noise for each timestep."""

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

__all__ = ["CORRECTION_FILE", "CorrectedDenoiser", "OutputCorrection", "load_correction"]

# Its name beside a saved model.
CORRECTION_FILE = "output_correction.safetensors"
FORMAT_VERSION = 2
_TENSORS = ("timesteps", "output_gains", "sample_gains", "offsets")
_METADATA = {"format": "tdq-output-correction", "version": str(FORMAT_VERSION)}


class OutputCorrection(Float32Module):
    """What a quantized denoiser's output is replaced with, at each timestep of a sampler.

    The corrected output is `output_gain * output + sample_gain * sample + offset`. Near pure noise
    the predicted noise is almost the sample itself, which quantization blurs and the sampler still
    has: that is what the gain of the sample brings back.

    Args:
        timesteps: Ascending, shape `(S,)`.
        output_gains: Of the model's output, one for each channel, shape `(S, C)`.
        sample_gains: Of the noisy sample that the model was given, shape `(S, C)`.
        offsets: Shape `(S, C, H, W)`.

    Raises:
        ScaleError: The shapes do not fit together, the timesteps do not ascend, or a value is not
            finite.

    Example:
        >>> ones = torch.ones(2, 1)
        >>> timesteps, offsets = torch.tensor([0.0, 500.0]), torch.ones(2, 1, 4, 4)
        >>> correction = OutputCorrection(timesteps, 2 * ones, -ones, offsets)
        >>> output, sample = torch.full((3, 1, 4, 4), 5.0), torch.full((3, 1, 4, 4), 4.0)
        >>> correction(output, 500, sample).mean()
        tensor(7.)
    """

    timesteps: Tensor
    output_gains: Tensor
    sample_gains: Tensor
    offsets: Tensor

    def __init__(
        self, timesteps: Tensor, output_gains: Tensor, sample_gains: Tensor, offsets: Tensor
    ) -> None:
        super().__init__()
        shapes = [tuple(part.shape) for part in (timesteps, output_gains, sample_gains, offsets)]
        steps, channels = shapes[3][:1], shapes[3][:2]
        if len(shapes[3]) != 4 or steps == (0,) or shapes[:3] != [steps, channels, channels]:
            raise ScaleError(
                f"Timesteps, gains of output and sample, and offsets of shapes {shapes}: for each "
                "timestep there is a gain for each channel, and an offset (C, H, W)."
            )
        values = (output_gains, sample_gains, offsets)
        if not bool((timesteps.diff() > 0).all()) or not all(v.isfinite().all() for v in values):
            raise ScaleError(
                "The timesteps of a correction ascend, and its gains and offsets are finite."
            )
        self.register_buffer("timesteps", timesteps.float().clone())
        self.register_buffer("output_gains", output_gains.float().clone())
        self.register_buffer("sample_gains", sample_gains.float().clone())
        self.register_buffer("offsets", offsets.float().clone())

    def forward(self, output: Tensor, timestep: Tensor | float, sample: Tensor) -> Tensor:
        """The corrected output.

        Args:
            output: Of the model, shape `(B, C, H, W)`.
            timestep: One timestep, or one for each sample.
            sample: What the model was given, same shape.

        Raises:
            LookupRuleError: The correction was not fitted for a timestep.
            ScaleError: Output or sample have another shape, or not as many samples as there are
                timesteps.
        """
        row = self._row(timestep)
        offsets = self.offsets[row]
        same = output.shape == sample.shape and output.shape[1:] == offsets.shape[1:]
        if not same or len(offsets) not in (1, len(output)):
            raise ScaleError(
                f"A correction with offsets of shape {tuple(offsets.shape)} was given an output of "
                f"shape {tuple(output.shape)} and a sample of shape {tuple(sample.shape)}. Give "
                "one timestep, or one for each sample, and fit a correction for this size."
            )
        scaled = with_gains(output, sample, self.output_gains[row], self.sample_gains[row])
        return (scaled + offsets).to(output.dtype)

    def _row(self, timestep: Tensor | float) -> Tensor:
        wanted = as_timesteps(timestep, self.timesteps.device)
        row = torch.searchsorted(self.timesteps, wanted).clamp(max=len(self.timesteps) - 1)
        known = self.timesteps[row] == wanted
        if not bool(known.all()):
            raise LookupRuleError(
                f"The output correction has no timestep {wanted[~known].tolist()[:5]}; it was "
                f"fitted for {self.timesteps.tolist()}. Fit one for this sampler."
            )
        return row

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, atomically."""
        tensors = {key: value.contiguous() for key, value in self.state_dict().items()}
        with atomic_file(path) as temporary:
            save_file(tensors, temporary, _METADATA)


def with_gains(
    output: Tensor, sample: Tensor, output_gains: Tensor, sample_gains: Tensor
) -> Tensor:
    """Output and sample `(B, C, H, W)`, scaled by a gain for each channel and added, in float32.

    Example:
        >>> images = torch.ones(1, 2, 1, 1)
        >>> with_gains(images, images, torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])).flatten()
        tensor([4., 6.])
    """
    return output_gains[..., None, None] * output + sample_gains[..., None, None] * sample


def load_correction(path: str | Path) -> OutputCorrection:
    """Read what `OutputCorrection.save` wrote.

    Raises:
        TableFormatError: The file is missing, truncated, no correction, or of an unknown version.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata, keys = file.metadata() or {}, set(file.keys())
            if metadata != _METADATA or keys != set(_TENSORS):
                raise TableFormatError(
                    f"{path} holds {sorted(keys)} with the metadata {json.dumps(metadata)}; "
                    f"an output correction of version {FORMAT_VERSION} is expected. Fit it anew."
                )
            return OutputCorrection(*(file.get_tensor(key) for key in _TENSORS))
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
            return self.correction(output, timestep, sample)
        if isinstance(output, tuple):
            return (self.correction(output[0], timestep, sample), *output[1:])
        output.sample = self.correction(output.sample, timestep, sample)
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
