"""A graph in the place of the UNet in a diffusers pipeline."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tdq_plugin.model_output import first_tensor

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d import UNet2DOutput

__all__ = ["PipelineDenoiser"]


class PipelineDenoiser(nn.Module):
    """Gives a graph what pipelines ask of a UNet: a configuration, `return_dict`, a device.

    Args:
        model: Called as `model(sample, timestep, ...)`: a graph of `trace`, quantized or not, what
            `lower_to_int8` or `load_int8` return, or one of these with a correction. Returns a
            tensor, or several of which the first is taken.
        config: The UNet's own configuration, `unet.config`.

    Attributes:
        config: The configuration.

    Example:
        Sampling with an int8 model::

            denoiser = tdq.PipelineDenoiser(int8, unet.config)
            pipeline = DDIMPipeline(unet=denoiser, scheduler=scheduler)
            images = pipeline(num_inference_steps=20).images
    """

    def __init__(self, model: Callable[..., Any], config: Mapping[str, Any]) -> None:
        from diffusers.configuration_utils import FrozenDict

        super().__init__()
        self.model = model
        self.config = FrozenDict(config)

    def forward(
        self, sample: Tensor, timestep: Tensor | float, *, return_dict: bool = True, **inputs: Any
    ) -> "UNet2DOutput | tuple[Tensor]":
        """Denoise one step.

        Args:
            sample: Shape `(B, C, H, W)`.
            timestep: One timestep, or one for each sample.
            return_dict: Return a `UNet2DOutput`, else a tuple.
            **inputs: Further inputs by name, such as `encoder_hidden_states`; those that are None
                are left out.
        """
        from diffusers.models.unets.unet_2d import UNet2DOutput

        given = {name: value for name, value in inputs.items() if value is not None}
        output = first_tensor(self.model(sample, timestep, **given))
        return UNet2DOutput(sample=output) if return_dict else (output,)

    @property
    def dtype(self) -> torch.dtype:
        """The type of the samples."""
        return next((p.dtype for p in self.parameters() if p.is_floating_point()), torch.float32)

    @property
    def device(self) -> torch.device:
        """Where the samples live."""
        tensors = (*self.parameters(), *self.buffers())
        return tensors[0].device if tensors else torch.device("cpu")
