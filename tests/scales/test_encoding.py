"""The Fourier encodings against their formulas."""

import math

import pytest
import torch

from tdq_plugin.scales.encoding import (
    band_limited_frequencies,
    fourier_encoding,
    geometric_frequencies,
)


def test_geometric_frequencies_are_those_of_equation_6() -> None:
    expected = [10000 ** (-2 * i / 64) for i in range(32)]
    assert geometric_frequencies(64).tolist() == pytest.approx(expected, rel=1e-6)


def test_band_limited_frequencies_span_a_quarter_to_four_cycles() -> None:
    cycles = band_limited_frequencies(16, 1000) * 1000 / (2 * math.pi)
    assert cycles[0].item() == pytest.approx(0.25)
    assert cycles[-1].item() == pytest.approx(4.0)
    ratios = cycles[1:] / cycles[:-1]
    torch.testing.assert_close(ratios, ratios[:1].expand_as(ratios))


def test_encoding_is_sines_then_cosines() -> None:
    timesteps, frequencies = torch.tensor([3.0, 999.0]), geometric_frequencies(8)
    encoded = fourier_encoding(timesteps, frequencies)
    for row, t in enumerate(timesteps.tolist()):
        angles = [t * frequency for frequency in frequencies.tolist()]
        expected = [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        assert encoded[row].tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    "frequencies", [geometric_frequencies(64), band_limited_frequencies(16, 1000)]
)
def test_every_timestep_has_its_own_encoding(frequencies: torch.Tensor) -> None:
    encoded = fourier_encoding(torch.arange(1000.0), frequencies)
    distance = torch.cdist(encoded, encoded) + torch.eye(1000) * 10
    assert distance.min() > 1e-3
