"""A converted UNet in the place of a UNet in a diffusers pipeline."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tdq_plugin.deploy.openvino.model import OpenVINOModel
from tdq_plugin.deploy.openvino.package import load_openvino, read_extra, save_openvino
from tdq_plugin.errors import TableFormatError

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d import UNet2DOutput

__all__ = ["OVDenoiser"]


class OVDenoiser:
    """Stands for the UNet of a diffusers pipeline: `DDIMPipeline(unet=OVDenoiser(...), ...)`.

    Args:
        model: From `to_openvino` or `load_openvino`.
        config: The UNet's own configuration, `unet.config`, which pipelines read.

    Attributes:
        config: The configuration.
        dtype: float32.
        device: The CPU.

    Example:
        Sampling from a saved folder::

            denoiser = OVDenoiser.load("model/openvino")
            pipeline = DDIMPipeline(unet=denoiser, scheduler=scheduler)
            images = pipeline(num_inference_steps=20).images
    """

    dtype = torch.float32
    device = torch.device("cpu")

    def __init__(self, model: OpenVINOModel, config: Mapping[str, Any]) -> None:
        from diffusers.configuration_utils import FrozenDict

        self.model = model
        self.config = FrozenDict(config)

    @classmethod
    def load(
        cls, folder: str | Path, *, properties: Mapping[str, Any] | None = None
    ) -> "OVDenoiser":
        """Read a folder that `save` wrote; arguments and errors as in `load_openvino`."""
        config = read_extra(folder).get("config")
        if config is None:
            raise TableFormatError(
                f"{folder} holds a converted model without the UNet's configuration. Pass it: "
                "OVDenoiser(load_openvino(folder), unet.config)."
            )
        return cls(load_openvino(folder, properties=properties), config)

    def save(self, folder: str | Path) -> None:
        """Write the model with the configuration; see `save_openvino`."""
        # diffusers keeps the path in it that a model was loaded from.
        config = {k: str(v) if isinstance(v, Path) else v for k, v in self.config.items()}
        save_openvino(self.model, folder, extra={"config": config})

    def __call__(
        self, sample: Tensor, timestep: Tensor | float, *, return_dict: bool = True, **inputs: Any
    ) -> "UNet2DOutput | tuple[Tensor]":
        """Denoise one step.

        Args:
            sample: Shape `(B, C, H, W)`.
            timestep: As `OpenVINOModel` takes it.
            return_dict: Return a `UNet2DOutput`, else a tuple.
            **inputs: Further inputs by name, such as `encoder_hidden_states`; those that are None
                are left out.

        Returns:
            The output, with the dtype and on the device of `sample`.
        """
        from diffusers.models.unets.unet_2d import UNet2DOutput

        given = {name: value for name, value in inputs.items() if value is not None}
        output = self.model(sample, timestep, **given).to(sample)
        return UNet2DOutput(sample=output) if return_dict else (output,)
