"""Architectures of well-known diffusers models, with random weights."""

import torch
from diffusers import UNet2DModel

__all__ = ["ddpm_cifar10"]


def ddpm_cifar10() -> UNet2DModel:
    """The UNet of google/ddpm-cifar10-32; always the same weights."""
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
