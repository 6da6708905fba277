"""Where the QAT recipes take models and images from, and what they are measured by."""

import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    FlowMatchEulerDiscreteScheduler,
    ScoreSdeVeScheduler,
)
from diffusers_models import one_level_unet
from PIL import Image
from pydantic import ValidationError
from torch import Tensor, nn

from tdq_plugin.errors import ConfigError
from tdq_plugin.recipes.digits import load_digits
from tdq_plugin.recipes.evaluation.image_quality import SampleQuality, as_bytes, missing_packages
from tdq_plugin.recipes.evaluation.reference import cached_images
from tdq_plugin.recipes.float_model import load_float_model, set_dropout
from tdq_plugin.recipes.image_data import DataSection, load_images
from tdq_plugin.recipes.plan import Memory, training_memory


def test_digits_in_the_shape_of_the_model() -> None:
    section = DataSection(source="digits", validation_images=100)
    training, held_out = load_images(section, (3, 16, 16))
    assert (len(training), len(held_out)) == (4900, 100)
    images = training[torch.tensor([0, 5])]
    assert images.shape == (2, 3, 16, 16)
    assert torch.equal(images[:, 0], images[:, 2])
    assert not set(training.numbers.tolist()) & set(held_out.numbers.tolist())
    assert sorted([*training.numbers.tolist(), *held_out.numbers.tolist()]) == list(range(5000))


def test_a_folder_of_pictures(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    Image.new("RGB", (12, 8), (255, 0, 0)).save(tmp_path / "a.png")
    Image.new("L", (8, 8), 255).save(tmp_path / "below" / "b.PNG")
    (tmp_path / "notes.txt").write_text("no picture")
    section = DataSection(source="folder", location=str(tmp_path), validation_images=1)
    parts = load_images(section, (3, 8, 8))
    assert [len(part) for part in parts] == [1, 1]
    both = torch.cat([part[torch.tensor([0])] for part in parts])
    colours = {tuple(image[:, 4, 4].tolist()) for image in both}
    assert colours == {(1.0, -1.0, -1.0), (1.0, 1.0, 1.0)}
    (grey,) = load_images(section, (1, 4, 4))[0][torch.tensor([0])]
    assert grey.shape == (1, 4, 4)


def test_too_few_images(tmp_path: Path) -> None:
    section = DataSection(source="folder", location=str(tmp_path), validation_images=3)
    with pytest.raises(ConfigError, match=r"'folder' has 0 images at .*validation_images = 3"):
        load_images(section, (3, 8, 8))


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    section = DataSection(source="folder", location=str(tmp_path / "no"), validation_images=3)
    with pytest.raises(ConfigError, match=r"^data.location = '.*no': there is no such folder\.$"):
        load_images(section, (3, 8, 8))
    # Not the current folder.
    with pytest.raises(ValidationError, match=r"source=folder needs a location"):
        DataSection(source="folder", validation_images=3)


@pytest.mark.skipif(find_spec("datasets") is not None, reason="datasets is installed")
def test_a_hub_dataset_needs_its_package() -> None:
    section = DataSection(source="hub", location="uoft-cs/cifar10", validation_images=1)
    with pytest.raises(ConfigError, match=r"uoft-cs/cifar10.*pip install .*'\.\[hub\]'"):
        load_images(section, (3, 32, 32))


def test_a_saved_pipeline(tiny_pipeline: Path) -> None:
    model = load_float_model(tiny_pipeline)
    assert isinstance(model.scheduler, DDIMScheduler)
    assert not model.unet.training
    set_dropout(model.unet, 0.3)
    rates = [module.p for module in model.unet.modules() if isinstance(module, nn.Dropout)]
    assert rates.count(0.3) == 5
    assert set(rates) == {0.3, 0.0}


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none' is neither the folder of a saved diffusers"):
        load_float_model(tmp_path / "none")


def test_a_model_of_a_release_that_is_not_here(tiny_pipeline: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_pipeline, tmp_path / "pipeline")
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("DDIMPipeline", "PipelineOfTomorrow"))
    with pytest.raises(ConfigError, match=r"neither the folder .* no attribute PipelineOfTomorrow"):
        load_float_model(folder)


def test_a_pipeline_without_folders(tiny_pipeline: Path, tmp_path: Path) -> None:
    """As google/ddpm-cifar10-32 is."""
    for file in [*tiny_pipeline.glob("*.*"), *tiny_pipeline.glob("*/*")]:
        shutil.copy(file, tmp_path)
    flat, usual = load_float_model(tmp_path), load_float_model(tiny_pipeline)
    assert flat.scheduler.config == usual.scheduler.config
    assert torch.equal(flat.unet.conv_in.weight, usual.unet.conv_in.weight)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (
            DDIMScheduler(prediction_type="v_prediction"),
            "predicts 'v_prediction'; this recipe takes models that predict the noise",
        ),
        (
            FlowMatchEulerDiscreteScheduler(),
            "has a FlowMatchEulerDiscreteScheduler without beta_schedule; this recipe takes models",
        ),
        (
            DDIMScheduler(num_train_timesteps=4000),
            r"has a process of 4000 timesteps; the methods of the recipes are made for 1000\. In a",
        ),
        (ScoreSdeVeScheduler(), "has a ScoreSdeVeScheduler without beta_schedule"),
    ],
)
@pytest.mark.parametrize("pipeline", [DDPMPipeline, DDIMPipeline])
def test_a_model_of_another_diffusion_process(
    pipeline: Any, scheduler: Any, message: str, tmp_path: Path
) -> None:
    """A DDIMPipeline makes a DDIM of any scheduler."""
    pipeline(one_level_unet(sample_size=8), DDIMScheduler()).save_pretrained(tmp_path)
    scheduler.save_pretrained(tmp_path / "scheduler")
    index = tmp_path / "model_index.json"
    index.write_text(index.read_text().replace("DDIMScheduler", type(scheduler).__name__))
    with pytest.raises(ConfigError, match=message):
        load_float_model(tmp_path)


def test_bytes_are_those_of_a_picture() -> None:
    images = torch.tensor([-1.0, 0.0, 1.0, 2.0]).reshape(1, 1, 2, 2)
    assert as_bytes(images).shape == (1, 3, 2, 2)
    assert as_bytes(images)[0, 2].flatten().tolist() == [0, 128, 255, 255]


def test_images_of_a_model_that_diverged() -> None:
    images = torch.zeros(3, 1, 2, 2)
    images[1, 0, 0, 0], images[2] = float("nan"), float("inf")
    with pytest.raises(ConfigError, match=r"^2 of 3 images have pixels that are not finite\. Look"):
        as_bytes(images)


def test_quality_of_samples() -> None:
    digits, _ = load_digits(16)
    noise = torch.randn(400, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    quality = SampleQuality("digits")
    for half in digits[::5].split(400):
        quality.add_real(half)
    results = []
    for drawn in (digits[::5], digits[1::5], noise):
        for part in drawn.split(300):
            quality.add_drawn(part)
        results.append(quality.compute())
    same, alike, wrong = (result["frechet_distance"] for result in results)
    assert abs(same) < 1e-6
    assert 0.01 < alike < 30 < wrong
    assert 5 < results[0]["inception_score"] <= 10
    assert results[2]["inception_score"] < 5


@pytest.mark.skipif(not missing_packages("inception"), reason="torch-fidelity is installed")
def test_inception_needs_its_packages() -> None:
    with pytest.raises(ConfigError, match=r"torch_fidelity.*pip install .*'\.\[inception\]'"):
        SampleQuality("inception")


def test_memory_of_training() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(10, 10, False), nn.Linear(10, 10, False)

        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            return self.second(self.first(sample).exp())

    # Of each sample, backward needs the input and exp's output, which the second layer reads too.
    memory = training_memory(Twice(), torch.zeros(2, 10), torch.zeros(2), beside=50)
    assert memory == Memory(state=5 * 800 + 50, activations=2 * 40)
    described = Memory(state=3 * 10**9, activations=10**8).describe(8)
    assert described.startswith(
        "3.80 GB: 3.00 for parameters and optimizer, 100.0 MB for each of 8"
    )


def test_kept_images_belong_to_one_model(tmp_path: Path) -> None:
    models = [tmp_path / "a", tmp_path / "b", Path("hub/one"), Path("hub/two")]
    for number, model in enumerate(models[:2]):
        model.mkdir()
        (model / "weights").write_text(str(number))
    for number, model in enumerate(models):
        drawn = torch.full((1,), float(number))
        for _ in range(2):
            kept = cached_images(tmp_path / "cache", "key", model, lambda drawn=drawn: drawn)
            assert torch.equal(kept, drawn)
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 4


def test_processes_that_start_together_draw_the_float_images_once(tmp_path: Path) -> None:
    drawn: list[Tensor] = []

    def draw() -> Tensor:
        time.sleep(0.2)
        drawn.append(torch.full((1, 1, 4, 4), float(len(drawn))))
        return drawn[-1]

    with ThreadPoolExecutor(2) as pool:
        model = Path("some/repository")
        calls = [pool.submit(cached_images, tmp_path, "key", model, draw) for _ in range(2)]
    assert len(drawn) == 1
    assert all(torch.equal(call.result(), drawn[0]) for call in calls)
