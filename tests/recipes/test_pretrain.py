"""The recipe that trains the float model: what it writes, and that a restart changes nothing."""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline
from matplotlib.image import imread
from safetensors.torch import load_file

from tdq_plugin.errors import ConfigError
from tdq_plugin.recipes import ddim_digits_pretrain, find_recipe
from tdq_plugin.recipes.digits import load_digits

SMALL = [
    "iterations=6",
    "batch_size=4",
    "warmup=2",
    "checkpoint_every=2",
    "unet.block_out_channels=[8, 16]",
    "unet.down_block_types=[DownBlock2D, AttnDownBlock2D]",
    "unet.up_block_types=[AttnUpBlock2D, UpBlock2D]",
    "unet.norm_num_groups=4",
    "unet.attention_head_dim=8",
]
PRETRAIN = find_recipe("ddim-digits-pretrain")


@pytest.fixture(scope="module", autouse=True)
def digits_are_read_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ddim_digits_pretrain, "load_digits", functools.cache(load_digits))
        yield


@pytest.fixture(scope="module")
def overrides(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [*SMALL, f"output={tmp_path_factory.mktemp('runs')}"]


@pytest.fixture(scope="module")
def finished(overrides: list[str]) -> Path:
    return PRETRAIN.run(PRETRAIN.configure(overrides))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "unet" / "diffusion_pytorch_model.safetensors")


def test_the_model_is_a_pipeline_that_draws(finished: Path) -> None:
    pipeline = DDIMPipeline.from_pretrained(finished / "model")
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(batch_size=2, num_inference_steps=2, output_type="np").images
    assert images.shape == (2, 16, 16, 1)


def test_the_figures_are_pictures(finished: Path) -> None:
    for name in ("loss.png", "samples.png"):
        height, width, _ = imread(finished / name).shape
        assert min(height, width) > 100


def test_a_restart_changes_nothing(
    finished: Path, overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = PRETRAIN.configure([*overrides, "name=interrupted"])
    steps: list[int] = []
    original = ddim_digits_pretrain.train_step

    def interrupted(training: Any, *args: Any) -> float:
        steps.append(training.step)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return original(training, *args)

    monkeypatch.setattr(ddim_digits_pretrain, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        PRETRAIN.run(config)
    assert not (config.run_folder / "model").exists()
    resumed = weights(PRETRAIN.run(config))
    assert steps == [0, 1, 2, 3, 2, 3, 4, 5]
    uninterrupted = weights(finished)
    assert resumed.keys() == uninterrupted.keys()
    assert all(torch.equal(resumed[name], uninterrupted[name]) for name in resumed)
    losses = [
        torch.load(folder / "checkpoint.pt", weights_only=True)["losses"]
        for folder in (finished, config.run_folder)
    ]
    assert len(losses[0]) == 6
    assert losses[0] == losses[1]


def test_training_moves_the_weights_by_the_seed(finished: Path, overrides: list[str]) -> None:
    other = weights(PRETRAIN.run(PRETRAIN.configure([*overrides, "name=seed1", "seed=1"])))
    assert not any(
        torch.equal(other[name], weight)
        for name, weight in weights(finished).items()
        if name.endswith("conv1.weight")
    )


def test_a_run_folder_belongs_to_one_configuration(finished: Path, overrides: list[str]) -> None:
    other = PRETRAIN.configure([*overrides, "batch_size=5"])
    with pytest.raises(ConfigError, match=r"was written with another configuration: .*batch_size"):
        PRETRAIN.run(other)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("iterations=0", r"^iterations = 0: Input should be greater than 0"),
        ("ema_decay=1", r"^ema_decay = 1: Input should be less than 1"),
        ("unet=3", r"^unet = 3: Input should be a valid dictionary"),
    ],
)
def test_mistakes_in_the_configuration(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PRETRAIN.configure([override])
