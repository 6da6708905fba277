"""The output correction in the PTQ recipes: rows of their own, and how it is fitted."""

from collections.abc import Collection
from pathlib import Path

import torch
from diffusers import DDIMScheduler
from pydantic import Field
from tqdm.auto import tqdm

from tdq_plugin.fit_correction import fit_output_correction
from tdq_plugin.output_correction import OutputCorrection, load_correction
from tdq_plugin.recipes.config import Section
from tdq_plugin.recipes.float_model import FloatModel
from tdq_plugin.recipes.ptq_methods import METHODS
from tdq_plugin.recipes.sampling import Denoiser

__all__ = ["CORRECTED", "CorrectionSection", "correction_of", "row_title", "row_titles"]

CORRECTED = "_corrected"
# Apart from the seeds of the calibration data.
SEEDS_APART = 2**30


class CorrectionSection(Section):
    """Rows with an output correction, each besides the row of the method without it.

    Attributes:
        methods: Which of the methods get such a row.
        images: Samples of the quantized and of the float model that it is fitted on.
    """

    methods: list[str]
    images: int = Field(gt=1)

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


def row_titles(methods: Collection[str], corrected: Collection[str]) -> dict[str, str]:
    """Names of a result's rows and their titles; a corrected row follows its method.

    Example:
        >>> row_titles(["mse", "tdq"], ["tdq"])
        {'mse': 'static MSE', 'tdq': 'TDQ', 'tdq_corrected': 'TDQ, corrected'}
    """
    rows = [
        row
        for name in methods
        for row in ([name, name + CORRECTED] if name in corrected else [name])
    ]
    return {row: row_title(row) for row in rows}


def row_title(row: str) -> str:
    """The title of a row of a quantized model."""
    method = row.removesuffix(CORRECTED)
    return METHODS[method].title + ("" if method == row else ", corrected")


def correction_of(
    denoiser: Denoiser,
    model: FloatModel,
    scheduler: DDIMScheduler,
    path: Path,
    images: int,
    seed: int,
    batch_size: int,
) -> OutputCorrection:
    """The correction that is kept at `path`; fitted on noise of its own if there is none yet.

    Args:
        denoiser: The quantized model.
        model: The float model.
        scheduler: The sampler, its timesteps set.
        path: Where it is kept: it belongs to the quantized model.
        images: Samples of both that it is fitted on.
        seed: Of the run.
        batch_size: Samples in a call.
    """
    device = model.unet.device
    if not path.exists():
        generator = torch.Generator().manual_seed(seed + SEEDS_APART)
        noise = torch.randn(images, *model.latent_shape, generator=generator).to(device)
        title = f"{METHODS[path.stem].title}: output correction"
        with tqdm(desc=title, total=len(scheduler.timesteps), unit="step") as progress:
            fit_output_correction(
                denoiser,
                model.denoise,
                scheduler,
                noise,
                batch_size,
                progress=lambda done, total: progress.update(done - progress.n),
            ).save(path)
    return load_correction(path).to(device)
