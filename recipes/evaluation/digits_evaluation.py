"""What every quantized digits model is measured on: the float model's trajectories and images."""

from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor
from tqdm.auto import tqdm

from tdq_plugin.errors import ConfigError
from tdq_plugin.recipes.config import Section, Seed
from tdq_plugin.recipes.digits import load_digits
from tdq_plugin.recipes.digits_classifier import load_classifier
from tdq_plugin.recipes.evaluation.denoiser import Evaluator
from tdq_plugin.recipes.evaluation.reference import cached_images
from tdq_plugin.recipes.evaluation.sampling import offset_of, sample, scheduler_with
from tdq_plugin.recipes.float_model import FloatModel

__all__ = ["UNSEEN", "EvaluationSection", "check_measurable", "float_images", "make_evaluator"]

# Where the timesteps lie that no calibration has seen, between two steps of the sampler.
UNSEEN = 0.5


class EvaluationSection(Section):
    """Images drawn per method, float trajectories followed, and the seed of their noise."""

    samples: int = Field(ge=100)
    trajectories: int = Field(gt=0)
    seed: Seed


def check_measurable(model: FloatModel) -> None:
    """See that the digit classifier takes the model's images.

    Raises:
        ConfigError: They are not grey.
    """
    if model.image_shape[0] != 1:
        raise ConfigError(
            f"The model draws images of {model.image_shape[0]} channels, and this recipe measures "
            "by a classifier of grey digits. Take a recipe of full size, ddim-cifar10-... or "
            "ldm-churches-..., whose feature networks take colours."
        )


def make_evaluator(
    section: EvaluationSection,
    steps: int,
    model: FloatModel,
    folder: Path,
    cache: Path,
    data: Tensor | None = None,
) -> Evaluator:
    """Draw what methods are compared with; the images are kept for other runs.

    Args:
        section: How much of it.
        steps: Of the DDIM sampler.
        model: The float model.
        folder: Where the float model came from.
        cache: Where its images are kept.
        data: Real images; None for the bundled digits.
    """
    generator = torch.Generator().manual_seed(section.seed)
    noise = _noise(section, model, generator)
    images = float_images(section, steps, model, folder, cache)
    halfway = offset_of(model.scheduler, steps, UNSEEN)
    trajectory_noise = torch.randn(section.trajectories, *model.latent_shape, generator=generator)
    classifier = load_classifier()
    with tqdm(total=2 * steps, desc="float32: trajectories", unit="step") as progress:
        return Evaluator(
            model.denoise,
            scheduler_with(model.scheduler, steps),
            unseen=scheduler_with(model.scheduler, steps, offset=halfway),
            noise=noise[: section.samples],
            images=images[: section.samples],
            other_images=images[section.samples :],
            trajectory_noise=trajectory_noise,
            features=classifier.features,
            data=load_digits(model.image_shape[1])[0] if data is None else data,
            decode=model.decode,
            classify=classifier,
            advance=progress.update,
        )


def float_images(
    section: EvaluationSection, steps: int, model: FloatModel, folder: Path, cache: Path
) -> Tensor:
    """The float model's images; the arguments are those of `make_evaluator`.

    Returns:
        Twice `section.samples` images: those that methods are compared with, and as many others.
    """

    def draw() -> Tensor:
        noise = _noise(section, model, torch.Generator().manual_seed(section.seed))
        scheduler = scheduler_with(model.scheduler, steps)
        with tqdm(total=len(noise), desc="float32: images", unit="image") as progress:
            return sample(
                model.denoise, scheduler, noise, advance=progress.update, decode=model.decode
            )

    key = f"{steps} steps, {section.samples} samples, seed {section.seed}"
    return cached_images(cache, key, folder, draw)


def _noise(section: EvaluationSection, model: FloatModel, generator: torch.Generator) -> Tensor:
    return torch.randn(2 * section.samples, *model.latent_shape, generator=generator)
