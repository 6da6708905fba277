"""Many samples of a model, drawn by all processes together, and their quality."""

from collections.abc import Iterator

import torch
from accelerate import Accelerator
from pydantic import Field
from torch import Tensor
from tqdm.auto import tqdm

from tdq_plugin.recipes.config import Section, Seed
from tdq_plugin.recipes.evaluation.image_quality import Features, SampleQuality
from tdq_plugin.recipes.evaluation.sampling import Denoiser, sample, scheduler_with
from tdq_plugin.recipes.float_model import FloatModel
from tdq_plugin.recipes.objectives import Source

__all__ = ["SampleEvaluation", "SampleEvaluationSection"]


class SampleEvaluationSection(Section):
    """How samples are judged.

    Attributes:
        samples: Images drawn of each model.
        steps: Of the DDIM sampler.
        batch_size: Images drawn together.
        features: `inception` for FID and IS as in papers; needs the extra `inception`.
        with_score: Whether to compute the IS, which has a meaning for images of many classes.
        seed: Of the noise; the same for every model.
    """

    samples: int = Field(ge=100)
    steps: int = Field(ge=2)
    batch_size: int = Field(gt=0)
    features: Features
    with_score: bool = True
    seed: Seed

    @classmethod
    def keys(cls) -> set[str]:
        """Dotted keys of a configuration that calls this section `evaluation`."""
        return {f"evaluation.{name}" for name in cls.model_fields}


class SampleEvaluation:
    """Compares models by their samples; the noise of image i is the same for all of them.

    Args:
        section: How.
        accelerator: Its processes share the work.
        model: The float model: its diffusion process and its latents.
        images: The real images.
    """

    def __init__(
        self,
        section: SampleEvaluationSection,
        accelerator: Accelerator,
        model: FloatModel,
        images: Source,
    ) -> None:
        self.section, self.accelerator, self.model = section, accelerator, model
        self.scheduler = scheduler_with(model.scheduler, section.steps)
        self.quality = SampleQuality(section.features, accelerator.device, section.with_score)
        for numbers in self._shared(len(images), "real images"):
            self.quality.add_real(images[numbers])

    @torch.no_grad()
    def evaluate(self, denoiser: Denoiser, title: str) -> dict[str, float]:
        """Draw, and compare; every process gets the result."""
        for numbers in self._shared(self.section.samples, title):
            noise = self._noise(numbers).to(self.accelerator.device)
            self.quality.add_drawn(
                sample(denoiser, self.scheduler, noise, len(noise), decode=self.model.decode)
            )
        return self.quality.compute()

    def _noise(self, numbers: Tensor) -> Tensor:
        # Of each image by itself, so that it depends on no batch.
        first, shape = self.section.seed * 1_000_003, self.model.latent_shape
        seeds = [first + number for number in numbers.tolist()]
        generator = torch.Generator()
        return torch.stack([torch.randn(shape, generator=generator.manual_seed(s)) for s in seeds])

    def _shared(self, count: int, title: str) -> Iterator[Tensor]:
        """Batches of numbers below `count`, dealt out to the processes."""
        batches = torch.arange(count).split(self.section.batch_size)
        mine = batches[self.accelerator.process_index :: self.accelerator.num_processes]
        return iter(tqdm(mine, desc=title, disable=not self.accelerator.is_main_process))
