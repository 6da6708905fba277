"""Models of diffusers with random weights, always the same ones."""

from typing import Any

import torch
from diffusers import UNet2DModel

__all__ = ["ddpm_cifar10", "one_level_unet", "tiny_unet"]


def tiny_unet(**changes: Any) -> UNet2DModel:
    """Two levels with attention and changes of the size: 41 layers on images of 8 x 8 pixels."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "layers_per_block": 1,
        "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "norm_num_groups": 4,
        "attention_head_dim": 8,
    }
    return UNet2DModel(**settings | changes)


def one_level_unet(**changes: Any) -> UNet2DModel:
    """The least of `tiny_unet`, where the kinds of layers do not matter."""
    settings = {
        "block_out_channels": (8,),
        "down_block_types": ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",),
    }
    return tiny_unet(**settings | changes)


def ddpm_cifar10() -> UNet2DModel:
    """The UNet of google/ddpm-cifar10-32."""
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        layers_per_block=2,
        block_out_channels=(128, 256, 256, 256),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
    )
