"""A tiny DDIM and a tiny LDM with random weights."""

from pathlib import Path

import pytest
from diffusers import AutoencoderKL, DDIMPipeline, DDIMScheduler, LDMPipeline
from diffusers_models import one_level_unet, tiny_unet


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "pipeline"
    denoiser = one_level_unet(sample_size=16, resnet_time_scale_shift="scale_shift")
    DDIMPipeline(denoiser, DDIMScheduler()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_latent_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images 1x16x16, latents 2x8x8."""
    denoiser = tiny_unet(in_channels=2, out_channels=2, resnet_time_scale_shift="scale_shift")
    autoencoder = AutoencoderKL(
        sample_size=16,
        in_channels=1,
        out_channels=1,
        latent_channels=2,
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        norm_num_groups=4,
        scaling_factor=2.0,
    )
    folder = tmp_path_factory.mktemp("tiny") / "latent-pipeline"
    scheduler = DDIMScheduler(clip_sample=False)
    LDMPipeline(autoencoder, denoiser, scheduler).save_pretrained(folder)
    return folder
