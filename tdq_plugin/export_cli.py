"""`tdq export`: a saved model for other runtimes."""

from pathlib import Path
from typing import Annotated

import typer

from tdq_plugin.errors import INSTALL, ConfigError

__all__ = ["export"]

export = typer.Typer(help="Convert a saved model for another runtime.", no_args_is_help=True)


@export.command()
def openvino(
    model: Annotated[Path, typer.Argument(help="The folder `model` of a recipe's results.")],
    folder: Annotated[Path, typer.Argument(help="The folder to create or replace.")],
) -> None:
    """Write an int8 UNet for OpenVINO, with its scheduler."""
    try:
        from diffusers import DDIMScheduler, UNet2DModel
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"The export needs {error.name}. {INSTALL.format('diffusers')}."
        ) from None
    import torch

    from tdq_plugin.deploy.openvino import OVDenoiser, to_openvino
    from tdq_plugin.deploy.package import load_int8, read_description
    from tdq_plugin.files import atomic_folder

    read_description(model / "int8")
    unet = UNet2DModel.from_config(UNet2DModel.load_config(model / "unet"))
    size = unet.config.sample_size
    example = torch.zeros(2, unet.config.in_channels, size, size), torch.zeros(2)
    converted = to_openvino(load_int8(model / "int8", unet, example), example)
    with atomic_folder(folder) as temporary:
        OVDenoiser(converted, unet.config).save(temporary / "unet")
        DDIMScheduler.from_pretrained(model / "scheduler").save_pretrained(temporary / "scheduler")
    typer.echo(converted.report)
    typer.echo(f"The model is in {folder}")
