"""A tiny DDIM and a tiny LDM with random weights, and runs of recipes on them."""

import json
from pathlib import Path
from typing import Any

import pytest
from diffusers import AutoencoderKL, DDIMPipeline, DDIMScheduler, LDMPipeline, UNet2DModel
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


@pytest.fixture(scope="module")
def unet(tiny_pipeline: Path) -> UNet2DModel:
    return UNet2DModel.from_pretrained(tiny_pipeline, subfolder="unet").eval()


@pytest.fixture(scope="module")
def overrides(
    request: pytest.FixtureRequest, tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[str]:
    """A module's settings `SMALL` for the tiny DDIM."""
    folder = tmp_path_factory.mktemp("runs")
    return [*request.module.SMALL, f"model={tiny_pipeline}", f"output={folder}"]


@pytest.fixture(scope="module")
def report(finished: Path) -> dict[str, Any]:
    """The report of the run that a module calls `finished`."""
    return json.loads((finished / "report.json").read_text())
