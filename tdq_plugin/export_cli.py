"""`tdq export`: a saved model for other runtimes."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tdq_plugin.errors import ConfigError
from tdq_plugin.extras import INSTALL

if TYPE_CHECKING:
    from diffusers import UNet2DModel

__all__ = ["architecture", "export"]

export = typer.Typer(help="Convert a saved model for another runtime.", no_args_is_help=True)


@export.command()
def openvino(
    model: Annotated[Path, typer.Argument(help="The folder `model` of a recipe's results.")],
    folder: Annotated[Path, typer.Argument(help="The folder to create or replace.")],
) -> None:
    """Write an int8 UNet for OpenVINO, with its scheduler and its output correction."""
    try:
        from diffusers import DDIMScheduler
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"The export needs {error.name}. {INSTALL.format('diffusers')}."
        ) from None
    import torch

    from tdq_plugin.deploy.openvino import OVDenoiser, to_openvino
    from tdq_plugin.deploy.package import load_int8
    from tdq_plugin.files import atomic_folder
    from tdq_plugin.output_correction import CORRECTION_FILE

    unet = architecture(model)
    size = unet.config.sample_size
    example = torch.zeros(2, unet.config.in_channels, size, size), torch.zeros(2)
    converted = to_openvino(load_int8(model / "int8", unet, example), example)
    corrected = (model / CORRECTION_FILE).exists()
    with atomic_folder(folder, marker="scheduler/scheduler_config.json") as temporary:
        OVDenoiser(converted, unet.config).save(temporary / "unet")
        DDIMScheduler.from_pretrained(model / "scheduler").save_pretrained(temporary / "scheduler")
        if corrected:
            shutil.copy(model / CORRECTION_FILE, temporary / CORRECTION_FILE)
    typer.echo(converted.report)
    typer.echo(f"The model is in {folder}")
    if corrected:
        typer.echo(
            f"Its output correction, which the UNet does not apply, is {CORRECTION_FILE} there."
        )


def architecture(model: Path) -> "UNet2DModel":
    """The float UNet of a recipe's saved model, with random weights, as `load_int8` takes it.

    Args:
        model: The folder `model` of a recipe's results.

    Raises:
        TableFormatError: It is no such folder.
    """
    from diffusers import UNet2DModel

    from tdq_plugin.deploy.package import read_description
    from tdq_plugin.recipes.float_model import set_attention_heads

    heads = read_description(model / "int8").get("extra", {}).get("attention_heads")
    unet: UNet2DModel = UNet2DModel.from_config(UNet2DModel.load_config(model / "unet"))
    if heads is not None:
        set_attention_heads(unet, heads)
    return unet
