"""A tiny DDIM with random weights, and digits that are read once."""

import functools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

from tdq_plugin.recipes import digits_evaluation, image_data
from tdq_plugin.recipes.digits import load_digits


@pytest.fixture(scope="session", autouse=True)
def digits_are_read_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for module in (image_data, digits_evaluation):
            patch.setattr(module, "load_digits", functools.cache(load_digits))
        yield


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=16,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=8,
        resnet_time_scale_shift="scale_shift",
    )
    folder = tmp_path_factory.mktemp("tiny") / "pipeline"
    DDIMPipeline(unet, DDIMScheduler()).save_pretrained(folder)
    return folder
