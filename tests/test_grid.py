"""Integer grids."""

from typing import Any

import pytest

from tdq_plugin.errors import ConfigError
from tdq_plugin.grid import QuantizationGrid, activation_grid, weight_grid


@pytest.mark.parametrize("bits", range(2, 9))
def test_grids_have_two_to_the_bits_codes(bits: int) -> None:
    for grid in (activation_grid(bits), activation_grid(bits, symmetric=True), weight_grid(bits)):
        assert grid.quant_max - grid.quant_min + 1 == 2**bits
        assert grid.bits == bits
    assert not activation_grid(bits).signed
    assert not activation_grid(bits).symmetric
    assert weight_grid(bits).signed
    assert weight_grid(bits).symmetric
    assert weight_grid(bits, symmetric=False).signed
    assert not weight_grid(bits, symmetric=False).symmetric


@pytest.mark.parametrize("bits", [-1, 0, 1, 9, 16])
def test_other_numbers_of_bits(bits: int) -> None:
    with pytest.raises(ConfigError, match=f"^{bits} bits are not supported. Choose 2 to 8.$"):
        activation_grid(bits)


@pytest.mark.parametrize("bits", [4.5, 4.0, "4"])
def test_bits_that_are_no_whole_number(bits: Any) -> None:
    with pytest.raises(ConfigError, match=f"^{bits!r} bits are not supported. Choose 2 to 8.$"):
        activation_grid(bits)


@pytest.mark.parametrize(("low", "high"), [(0, 0), (5, 1), (0, 256), (-200, 127)])
def test_ranges_that_are_no_grid(low: int, high: int) -> None:
    with pytest.raises(ConfigError, match=rf"Codes {low} .. {high} are not a range of 2 to 8 bits"):
        QuantizationGrid(low, high)
