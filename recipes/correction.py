"""The output correction in the recipes: rows of their own, and how it is fitted."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Protocol

import torch
from diffusers import DDIMScheduler
from pydantic import Field
from tqdm.auto import tqdm

from tdq_plugin.fit_correction import fit_output_correction
from tdq_plugin.output_correction import CorrectedDenoiser, load_correction
from tdq_plugin.recipes.config import Section
from tdq_plugin.recipes.evaluation.sampling import Denoiser
from tdq_plugin.recipes.float_model import FloatModel

__all__ = [
    "CORRECTED",
    "NOTE",
    "CorrectionSection",
    "corrected",
    "method_of",
    "row_title",
    "row_titles",
]

CORRECTED = "_corrected"
NOTE = (
    "Corrected: an image is added to the predicted noise at each timestep, fitted so that the mean "
    "of the quantized model's samples is that of the float model's after every step. Near pure "
    "noise, prediction and sample are scaled, too, unless correction.explained is 1. It belongs to "
    "the sampler's timesteps; at others there is no corrected row."
)
# Apart from the seeds of the calibration data.
SEEDS_APART = 2**30


class CorrectionSection(Section):
    """Rows with an output correction, each besides the row of the method without it.

    Attributes:
        methods: Which of the methods get such a row.
        images: Samples of the quantized and of the float model that it is fitted on.
        explained: Share of a timestep's error that gains of output and sample have to take away to
            be used there. With 1 an image is added to the output and no more.
    """

    methods: list[str]
    images: int = Field(gt=1)
    explained: float = Field(ge=0, le=1)

    @property
    def denoised(self) -> int:
        """Images that both models denoise at each step to fit one correction."""
        return 3 * self.images

    def check(self, methods: Collection[str], key: str) -> "CorrectionSection":
        """See that there are rows without the correction, too.

        Args:
            methods: Those rows.
            key: Where the configuration has them.

        Raises:
            ValueError: A method has none.
        """
        others = sorted(set(self.methods) - set(methods))
        if others:
            raise ValueError(f"methods: {others} are not among {key}")
        return self


class Titled(Protocol):
    """What has a name in tables and figures."""

    @property
    def title(self) -> str: ...


def row_titles(
    methods: Mapping[str, Titled], names: Collection[str], corrected: Collection[str]
) -> dict[str, str]:
    """Names of a result's rows and their titles; a corrected row follows its method.

    Example:
        >>> from tdq_plugin.recipes.ptq.methods import METHODS
        >>> row_titles(METHODS, ["mse", "tdq"], ["tdq"])
        {'mse': 'static MSE', 'tdq': 'TDQ', 'tdq_corrected': 'TDQ, corrected'}
    """
    rows = [
        row for name in names for row in ([name, name + CORRECTED] if name in corrected else [name])
    ]
    return {row: row_title(methods, row) for row in rows}


def row_title(methods: Mapping[str, Titled], row: str) -> str:
    """The title of a row of a quantized model."""
    method = method_of(row)
    return methods[method].title + ("" if method == row else ", corrected")


def method_of(row: str) -> str:
    """The method of a row, corrected or not."""
    return row.removesuffix(CORRECTED)


def corrected(
    denoiser: Denoiser,
    model: FloatModel,
    scheduler: DDIMScheduler,
    path: Path,
    section: CorrectionSection,
    seed: int,
    batch_size: int = 200,
) -> CorrectedDenoiser:
    """With the correction that is kept at `path`; fitted on noise of its own if there is none yet.

    Args:
        denoiser: The quantized model.
        model: The float model.
        scheduler: The sampler, its timesteps set.
        path: Where it is kept: it belongs to the quantized model.
        section: How it is fitted.
        seed: Of the run.
        batch_size: Samples in a call.
    """
    device = model.unet.device
    if not path.exists():
        generator = torch.Generator().manual_seed(seed + SEEDS_APART)
        noise = torch.randn(section.images, *model.latent_shape, generator=generator).to(device)
        title = f"{path.stem}: output correction"
        with tqdm(desc=title, total=len(scheduler.timesteps), unit="step") as progress:
            fit_output_correction(
                denoiser,
                model.denoise,
                scheduler,
                noise,
                batch_size,
                progress=lambda done, total: progress.update(done - progress.n),
                explained=section.explained,
            ).save(path)
    return CorrectedDenoiser(denoiser, load_correction(path).to(device))
