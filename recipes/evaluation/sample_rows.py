"""Rows of a full-size recipe's result: each model is judged once, and its row is kept."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tdq_plugin.files import atomic_file
from tdq_plugin.recipes.evaluation.sample_evaluation import (
    SampleEvaluation,
    SampleEvaluationSection,
)
from tdq_plugin.recipes.evaluation.sampling import Denoiser, sample

__all__ = ["SampleRows"]

SHOWN = 16


class SampleRows:
    """What has been measured so far.

    Args:
        folder: Where rows are kept.
        section: How models are judged; rows of another evaluation stay apart.
    """

    def __init__(self, folder: Path, section: SampleEvaluationSection) -> None:
        self.folder = folder
        decisive = section.model_dump_json(exclude={"batch_size"})
        self._evaluation = hashlib.sha256(decisive.encode()).hexdigest()[:8]

    def missing(self, names: Iterable[str]) -> list[str]:
        """Those models that have no row yet."""
        return [name for name in names if not self._path(name).exists()]

    def measure(self, name: str, denoiser: Denoiser, evaluation: SampleEvaluation) -> None:
        """Judge a model. All processes take part, the first one writes."""
        row = evaluation.evaluate(denoiser, f"{name}: images")
        if evaluation.accelerator.is_main_process:
            path = self._path(name)
            with atomic_file(path.with_suffix(".safetensors")) as temporary:
                save_file({"images": _a_few(denoiser, evaluation)}, temporary)
            with atomic_file(path) as temporary:
                temporary.write_text(json.dumps(row, indent=2))
        evaluation.accelerator.wait_for_everyone()

    def row(self, name: str) -> dict[str, float]:
        """The metrics of a model."""
        row: dict[str, float] = json.loads(self._path(name).read_text())
        return row

    def images(self, name: str) -> Tensor:
        """A few images, which every model drew from the same noise."""
        return load_file(self._path(name).with_suffix(".safetensors"))["images"]

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}-{self._evaluation}.json"


def _a_few(denoiser: Denoiser, evaluation: SampleEvaluation) -> Tensor:
    generator = torch.Generator().manual_seed(evaluation.section.seed)
    noise = torch.randn(SHOWN, *evaluation.model.latent_shape, generator=generator)
    noise = noise.to(evaluation.accelerator.device)
    drawn = sample(denoiser, evaluation.scheduler, noise, decode=evaluation.model.decode)
    return drawn.cpu().contiguous()
