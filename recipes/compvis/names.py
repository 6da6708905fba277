"""Where the layers of diffusers' networks are in CompVis' latent-diffusion.

Facts: `openaimodel.py` and `model.py` in `ldm/modules/diffusionmodules` of
github.com/CompVis/latent-diffusion. Names of layers that a network does not have do no harm: they
are never looked up.
"""

from collections.abc import Iterator
from itertools import count

from diffusers import AutoencoderKL, UNet2DModel

__all__ = ["autoencoder_layers", "unet_layers"]

ENDS = {"conv_in": "conv_in", "conv_norm_out": "norm_out", "conv_out": "conv_out"}
UNET_RESIDUAL = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET_ATTENTION = {
    "group_norm": "norm",
    "to_q": "qkv",
    "to_k": "qkv",
    "to_v": "qkv",
    "to_out.0": "proj_out",
}
RESIDUAL = {
    "norm1": "norm1",
    "conv1": "conv1",
    "norm2": "norm2",
    "conv2": "conv2",
    "conv_shortcut": "nin_shortcut",
}
ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}


def unet_layers(unet: UNet2DModel) -> dict[str, str]:
    """Of each layer of a UNet whose residual blocks resize: its name below `diffusion_model`.

    Query, key and value of an attention are one layer there.
    """
    layers = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    return layers | _inside(_unet_blocks(unet), UNET_RESIDUAL, UNET_ATTENTION)


def autoencoder_layers(autoencoder: AutoencoderKL) -> dict[str, str]:
    """Of each layer of an autoencoder: its name below `first_stage_model`."""
    layers = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    for half in ("encoder", "decoder"):
        layers |= {f"{half}.{ours}": f"{half}.{theirs}" for ours, theirs in ENDS.items()}
    last = len(autoencoder.decoder.up_blocks) - 1
    for level in range(last + 1):
        layers[f"encoder.down_blocks.{level}.downsamplers.0.conv"] = (
            f"encoder.down.{level}.downsample.conv"
        )
        layers[f"decoder.up_blocks.{level}.upsamplers.0.conv"] = (
            f"decoder.up.{last - level}.upsample.conv"
        )
    return layers | _inside(_autoencoder_blocks(autoencoder), RESIDUAL, ATTENTION)


def _inside(
    blocks: Iterator[tuple[str, str]], residual: dict[str, str], attention: dict[str, str]
) -> dict[str, str]:
    """The layers inside of residual blocks and attentions."""
    layers = {}
    for ours, theirs in blocks:
        for layer, its in (attention if ".attentions." in ours else residual).items():
            layers[f"{ours}.{layer}"] = f"{theirs}.{its}"
    return layers


def _unet_blocks(unet: UNet2DModel) -> Iterator[tuple[str, str]]:
    """CompVis numbers residual blocks through, with what follows them, over all levels."""
    inputs, outputs = count(1), count()
    for level, block in enumerate(unet.down_blocks):
        for index in range(len(block.resnets)):
            position = next(inputs)
            yield f"down_blocks.{level}.resnets.{index}", f"input_blocks.{position}.0"
            yield f"down_blocks.{level}.attentions.{index}", f"input_blocks.{position}.1"
        yield f"down_blocks.{level}.downsamplers.0", f"input_blocks.{next(inputs)}.0"
    yield "mid_block.resnets.0", "middle_block.0"
    yield "mid_block.attentions.0", "middle_block.1"
    yield "mid_block.resnets.1", "middle_block.2"
    for level, block in enumerate(unet.up_blocks):
        for index in range(len(block.resnets)):
            position = next(outputs)
            yield f"up_blocks.{level}.resnets.{index}", f"output_blocks.{position}.0"
            yield f"up_blocks.{level}.attentions.{index}", f"output_blocks.{position}.1"
        behind = 2 if hasattr(block, "attentions") else 1
        yield f"up_blocks.{level}.upsamplers.0", f"output_blocks.{position}.{behind}"


def _autoencoder_blocks(autoencoder: AutoencoderKL) -> Iterator[tuple[str, str]]:
    """CompVis counts the levels of the decoder from the image, not from the latents."""
    for half in ("encoder", "decoder"):
        yield f"{half}.mid_block.resnets.0", f"{half}.mid.block_1"
        yield f"{half}.mid_block.attentions.0", f"{half}.mid.attn_1"
        yield f"{half}.mid_block.resnets.1", f"{half}.mid.block_2"
    for level, block in enumerate(autoencoder.encoder.down_blocks):
        for index in range(len(block.resnets)):
            ours = f"encoder.down_blocks.{level}.resnets.{index}"
            yield ours, f"encoder.down.{level}.block.{index}"
    last = len(autoencoder.decoder.up_blocks) - 1
    for level, block in enumerate(autoencoder.decoder.up_blocks):
        for index in range(len(block.resnets)):
            ours = f"decoder.up_blocks.{level}.resnets.{index}"
            yield ours, f"decoder.up.{last - level}.block.{index}"
