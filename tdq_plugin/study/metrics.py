"""How good a set of images is: Fréchet distance to another set, and clarity of the classes."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tdq_plugin.errors import ConfigError

if TYPE_CHECKING:
    from torchmetrics.image.fid import FrechetInceptionDistance

__all__ = ["FrechetReference", "classifier_score", "require_finite"]


class FrechetReference:
    """A set of images that many others are compared with.

    The distance is that of Heusel et al., "GANs Trained by a Two Time-Scale Update Rule" (2017),
    between Gaussians fitted to the features of both sets. With another network than Inception it
    is not "FID": name the network and the number of images wherever the number is printed. It is
    biased upward for few images, so compare sets of equal size only.

    Args:
        feature_network: Maps a batch of images to features `(N, D)`.
        images: The reference, `(N, ...)`, N >= 2.
        batch_size: Images in one call of the network.

    Raises:
        ConfigError: There are fewer than two images, or a feature is not finite.

    Example:
        >>> import torch
        >>> points = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0], [2.0, 2.0]])
        >>> reference = FrechetReference(torch.nn.Identity(), points)
        >>> round(reference.distance(points + torch.tensor([3.0, 4.0])), 6)
        25.0
    """

    def __init__(
        self,
        feature_network: Callable[[Tensor], Tensor],
        images: Tensor,
        batch_size: int = 500,
    ) -> None:
        self.feature_network = feature_network
        self.batch_size = batch_size
        features = self.features(images)
        self._metric = _metric_on_features(features.shape[1])
        self._metric.update(features, real=True)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Return the features `(N, D)` of images `(N, ...)` as float64."""
        if len(images) < 2:
            raise ConfigError(f"A Fréchet distance needs at least 2 images, got {len(images)}.")
        starts = range(0, len(images), self.batch_size)
        batches = [self.feature_network(images[i : i + self.batch_size]) for i in starts]
        features = torch.cat(batches).double()
        require_finite(features, "features")
        return features

    def distance(self, images: Tensor) -> float:
        """Return the squared Fréchet distance of images `(N, ...)` to the reference.

        Raises:
            ConfigError: There are fewer than two images, or a feature is not finite.
        """
        self._metric.reset()
        self._metric.update(self.features(images), real=False)
        return float(self._metric.compute())


def require_finite(values: Tensor, what: str) -> None:
    """See that a model has drawn images, not infinities.

    Args:
        values: Of N images, shape `(N, ...)`.
        what: They are, for the message.

    Raises:
        ConfigError: A value is not finite.
    """
    broken = int((~values.isfinite()).flatten(1).any(dim=1).sum())
    if broken:
        raise ConfigError(
            f"{broken} of {len(values)} images have {what} that are not finite. "
            "Look at the samples: the model that drew them has probably diverged."
        )


def _metric_on_features(dimension: int) -> "FrechetInceptionDistance":
    """Build a torchmetrics metric that is fed features and keeps its reference over resets."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    passthrough = nn.Identity()
    # Without this attribute torchmetrics probes the module with an ImageNet-sized picture.
    passthrough.num_features = dimension  # type: ignore[assignment]
    # One process has all images; the others may not come to the same place.
    return FrechetInceptionDistance(passthrough, reset_real_features=False, sync_on_compute=False)


def classifier_score(logits: Tensor) -> float:
    """The Inception score's formula with a classifier of our choice: higher is better.

    `exp(mean over images of KL(p(class | image) || p(class)))` as in Salimans et al., "Improved
    Techniques for Training GANs" (2016), over all images at once instead of ten parts. It lies
    between 1, no image tells a class, and the number of classes, every image does and all classes
    are equally frequent. It does not compare with real images.

    Args:
        logits: The classifier's, shape `(N, K)`.

    Raises:
        ConfigError: A logit is not finite.

    Example:
        >>> round(classifier_score(torch.eye(4) * 100), 6), classifier_score(torch.zeros(8, 4))
        (4.0, 1.0)
    """
    broken = int((~logits.isfinite()).any(dim=1).sum())
    if broken:
        raise ConfigError(
            f"{broken} of {len(logits)} images have logits that "
            "are not finite. Look at the samples: the model that drew them has probably diverged."
        )
    log_conditional = logits.double().log_softmax(dim=1)
    conditional = log_conditional.exp()
    log_marginal = conditional.mean(dim=0).clamp_min(1e-300).log()
    divergence = (conditional * (log_conditional - log_marginal)).sum(dim=1)
    return divergence.mean().exp().item()
