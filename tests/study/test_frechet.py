"""The Fréchet distance against an independent float64 computation, the score, and failures."""

import numpy as np
import pytest
import torch
from scipy import linalg
from torch import Tensor, nn
from torchmetrics.image.inception import InceptionScore

from tdq_plugin.errors import ConfigError
from tdq_plugin.recipes.digits import load_digits
from tdq_plugin.recipes.digits_classifier import load_classifier
from tdq_plugin.study import FrechetReference, classifier_score


def scipy_distance(first: Tensor, second: Tensor) -> float:
    a, b = first.double().numpy(), second.double().numpy()
    covariance_a, covariance_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = linalg.sqrtm(covariance_a @ covariance_b).real
    shift = a.mean(0) - b.mean(0)
    return float(shift @ shift + np.trace(covariance_a + covariance_b - 2 * root))


def gaussians(seed: int, count: int = 400, dimension: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dimension, dimension, generator=generator)
    offset = torch.randn(dimension, generator=generator)
    return torch.randn(count, dimension, generator=generator) @ mixing + offset


def test_equals_scipy_in_float64_for_many_sets_against_one_reference() -> None:
    reference = FrechetReference(nn.Identity(), gaussians(0), batch_size=150)
    for seed in (1, 2, 3):
        expected = scipy_distance(gaussians(0), gaussians(seed))
        assert reference.distance(gaussians(seed)) == pytest.approx(expected, rel=1e-9)


def test_distance_to_itself_is_zero() -> None:
    assert FrechetReference(nn.Identity(), gaussians(0)).distance(gaussians(0)) < 1e-6


def test_images_reach_the_network_unchanged() -> None:
    seen: list[Tensor] = []

    def network(images: Tensor) -> Tensor:
        seen.append(images)
        return images.flatten(1)

    images = torch.linspace(-1, 1, 40).reshape(10, 1, 2, 2)
    FrechetReference(network, images)
    assert torch.equal(torch.cat(seen), images)


def test_grows_with_the_damage_to_digits() -> None:
    images, _ = load_digits()
    reference = FrechetReference(load_classifier().features, images[::2])
    noise = torch.randn(images[1::2].shape, generator=torch.Generator().manual_seed(0))
    clean, slight, strong = (
        reference.distance(images[1::2] + level * noise) for level in (0.0, 0.2, 0.6)
    )
    assert clean * 10 < slight < strong / 3


def test_diverged_samples_are_named() -> None:
    samples = gaussians(1)
    samples[3] = torch.nan
    with pytest.raises(ConfigError, match=r"1 of 400 images .* not finite"):
        FrechetReference(nn.Identity(), gaussians(0)).distance(samples)


def test_too_few_images() -> None:
    with pytest.raises(ConfigError, match="at least 2 images, got 1"):
        FrechetReference(nn.Identity(), gaussians(0)[:1])


@pytest.mark.filterwarnings("ignore:.*degrees of freedom:UserWarning")  # of one part
def test_the_classifier_score_is_that_of_torchmetrics_over_one_part() -> None:
    logits = 3 * torch.randn(200, 10, generator=torch.Generator().manual_seed(0))
    metric = InceptionScore(nn.Identity(), splits=1)
    metric.update(logits)
    assert classifier_score(logits) == pytest.approx(float(metric.compute()[0]), rel=1e-5)


def test_real_digits_have_a_higher_score_than_noise_and_than_one_class() -> None:
    classifier, (images, labels) = load_classifier(), load_digits()
    with torch.no_grad():
        real, noise = classifier(images), classifier(torch.randn(1000, 1, 16, 16))
    scores = [classifier_score(logits) for logits in (real, noise, real[labels == 3])]
    assert 7 < scores[0] < 10
    assert max(scores[1:]) < 4


def test_logits_that_are_not_finite() -> None:
    with pytest.raises(ConfigError, match="2 of 3 images have logits that are not finite"):
        classifier_score(torch.tensor([[0.0, 1.0], [torch.nan, 0.0], [torch.inf, 0.0]]))
