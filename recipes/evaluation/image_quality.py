"""Fréchet distance and inception-style score of samples, in a feature space of choice."""

from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tdq_plugin.errors import ConfigError
from tdq_plugin.extras import INSTALL
from tdq_plugin.recipes.digits_classifier import load_classifier
from tdq_plugin.study.metrics import require_finite

__all__ = [
    "FEATURE_SPACES",
    "Features",
    "SampleQuality",
    "as_bytes",
    "missing_packages",
    "require_features",
]

Features = Literal["inception", "digits"]
_INCEPTION = "inception-v3-compat"
FEATURE_SPACES = {
    "inception": "Inception-v3 of torch-fidelity, 2048 features: FID and IS as in papers",
    "digits": "digit classifier of recipes/assets/digits-classifier, 64 features: not the FID and "
    "IS of papers",
}
# Logits of an image.
_CLASSES = {"inception": 1008, "digits": 10}


def missing_packages(features: Features) -> list[str]:
    """Packages that the feature network needs and that are not installed."""
    needed = ("torch_fidelity", "torchvision") if features == "inception" else ()
    return [name for name in needed if find_spec(name) is None]


def require_features(features: Features) -> None:
    """Check before anything else that the feature network can be used.

    Raises:
        ConfigError: A package is missing.
    """
    missing = missing_packages(features)
    if missing:
        raise ConfigError(
            f"evaluation.features = 'inception' needs {' and '.join(missing)}. "
            f"{INSTALL.format('inception')}; or choose evaluation.features=digits."
        )


class SampleQuality:
    """Compares drawn images with real ones; processes of one run are added up.

    Args:
        features: The feature network.
        device: Where it runs.
        with_score: Whether to compute the inception-style score, too; it has a meaning for images
            of many classes.

    Raises:
        ConfigError: A package is missing.
    """

    def __init__(
        self, features: Features, device: torch.device | str = "cpu", with_score: bool = True
    ) -> None:
        from torchmetrics.image.fid import FrechetInceptionDistance, NoTrainInceptionV3
        from torchmetrics.image.inception import InceptionScore

        require_features(features)
        of_distance: Any = 2048
        of_score: Any
        if features == "inception":
            # As papers resize; torchmetrics' default is antialiased.
            of_score = NoTrainInceptionV3(_INCEPTION, ["logits_unbiased"], antialias=False)
        else:
            of_distance, of_score = _DigitFeatures("features"), _DigitFeatures("forward")
        distance = FrechetInceptionDistance(of_distance, reset_real_features=False, antialias=False)
        self.distance = distance.to(device)
        self.score = InceptionScore(of_score).to(device) if with_score else None
        self._no_logits = torch.empty(0, _CLASSES[features], device=device)
        self.device = device

    def add_real(self, images: Tensor) -> None:
        """Add real images `(N, C, H, W)` in [-1, 1]."""
        self.distance.update(as_bytes(images).to(self.device), real=True)

    def add_drawn(self, images: Tensor) -> None:
        """Add samples `(N, C, H, W)` in [-1, 1]."""
        pixels = as_bytes(images).to(self.device)
        self.distance.update(pixels, real=False)
        if self.score is not None:
            self.score.update(pixels)

    def compute(self) -> dict[str, float]:
        """The metrics of the drawn images, which are forgotten then."""
        metrics = {"frechet_distance": float(self.distance.compute())}
        self.distance.reset()
        if self.score is not None:
            # One tensor, as processes gather tensor by tensor and must have equally many.
            self.score.features = [torch.cat([self._no_logits, *self.score.features])]
            torch.manual_seed(0)  # The score is the mean over ten random parts.
            mean, deviation = self.score.compute()
            metrics["inception_score"] = float(mean)
            metrics["inception_score_deviation"] = float(deviation)
            self.score.reset()
        return metrics


def as_bytes(images: Tensor) -> Tensor:
    """Images in [-1, 1] as a file would hold them: 0 to 255, three channels or more.

    Raises:
        ConfigError: A pixel is not finite; as a byte it would be grey or black.
    """
    require_finite(images, "pixels")
    pixels = ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return pixels.expand(-1, 3, -1, -1) if pixels.shape[1] == 1 else pixels


class _DigitFeatures(nn.Module):
    """The digit classifier for images of any size, as torchmetrics calls a feature network."""

    num_features = 64

    def __init__(self, output: Literal["features", "forward"]) -> None:
        super().__init__()
        self.network, self.output = load_classifier(), output

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        grey = pixels.float().mean(dim=1, keepdim=True) / 127.5 - 1
        return getattr(self.network, self.output)(grey)
