"""TDQ's scale generator: Fourier encoding of t, a 4-layer MLP per quantizer, a positive scale."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from tdq_plugin.errors import ConfigError, TimestepError
from tdq_plugin.grid import QuantizationGrid
from tdq_plugin.options import check_option
from tdq_plugin.scales.bank import Output, TrainableBank
from tdq_plugin.scales.encoding import (
    band_limited_frequencies,
    fourier_encoding,
    geometric_frequencies,
)

__all__ = ["DEFAULT", "PAPER", "GeneratorBank", "GeneratorConfig"]

Encoding = Literal["band_limited", "geometric"]
Initialisation = Literal["zero_output", "he"]


@dataclass(frozen=True)
class GeneratorConfig:
    """Shape and start of the generators.

    Attributes:
        encoding: `band_limited`, or the paper's `geometric` (eq. 6).
        encoding_size: Number of sines and cosines together.
        depth: Number of linear layers.
        width: Hidden units.
        output: Exponential relative to the static scale, or softplus.
        initialisation: `zero_output` starts at the static scale for every t; `he` draws every
            layer by He initialisation, as the paper does.
        num_timesteps: Length of the diffusion process; scales the band-limited encoding, which
            repeats itself beyond.

    Raises:
        ConfigError: A size is not positive, `encoding_size` is odd, or there is no such encoding
            or initialisation.
    """

    encoding: Encoding = "band_limited"
    encoding_size: int = 16
    depth: int = 4
    width: int = 64
    output: Output = "exponential"
    initialisation: Initialisation = "zero_output"
    num_timesteps: int = 1000

    def __post_init__(self) -> None:
        if self.encoding_size < 2 or self.encoding_size % 2:
            raise ConfigError(f"encoding_size = {self.encoding_size} is not even and positive.")
        if self.depth < 1 or self.width < 1:
            raise ConfigError(f"depth = {self.depth} and width = {self.width} must be positive.")
        check_option("encoding", self.encoding, get_args(Encoding))
        check_option("initialisation", self.initialisation, get_args(Initialisation))


DEFAULT = GeneratorConfig()
PAPER = GeneratorConfig(
    encoding="geometric", encoding_size=64, output="softplus", initialisation="he"
)


class GeneratorBank(TrainableBank):
    """One MLP per quantizer, all evaluated in one batched matrix product per layer (TDQ, 4.2).

    Args:
        grids: The grid of each quantizer by its name.
        config: Shape and start of the generators.
        seed: Seed of the initialisation.
        **options: As for `TrainableBank`.

    Example:
        >>> from tdq_plugin.grid import activation_grid
        >>> bank = GeneratorBank({"conv": activation_grid(8)})
        >>> bank.set_static(torch.tensor([0.1]), torch.tensor([128.0]))
        >>> bank(500)[0]
        tensor([[0.1000]], grad_fn=<ClampBackward1>)
    """

    frequencies: Tensor

    def __init__(
        self,
        grids: Mapping[str, QuantizationGrid],
        config: GeneratorConfig = DEFAULT,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(grids, output=config.output, **options)
        self.config = config
        self.register_buffer("frequencies", _frequencies(config), persistent=False)
        sizes = [config.encoding_size, *[config.width] * (config.depth - 1), self.curves_per_row]
        generator = torch.Generator().manual_seed(seed)
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for fan_in, fan_out in pairwise(sizes):
            shape = (len(self.names), fan_in, fan_out)
            weight = torch.randn(shape, generator=generator) * math.sqrt(2 / fan_in)
            self.weights.append(nn.Parameter(weight))
            self.biases.append(nn.Parameter(torch.zeros(len(self.names), 1, fan_out)))
        if config.initialisation == "zero_output":
            nn.init.zeros_(self.weights[-1])

    def curves(self, timesteps: Tensor) -> Tensor:
        self._check(timesteps)
        return self._evaluate(timesteps, [*self.weights], [*self.biases])

    def fit(self, timesteps: Tensor, curves: Tensor, iterations: int = 400) -> None:
        """Regress the generators onto the given curves with Adam."""
        self._check(timesteps)
        current = [*self.weights, *self.biases]
        # Copies can be trained whatever the mode of the caller and the flags of the parameters.
        with torch.inference_mode(False), torch.enable_grad():
            timesteps, curves = timesteps.clone(), curves.clone()
            fitted = [parameter.detach().clone().requires_grad_() for parameter in current]
            weights, biases = fitted[: len(self.weights)], fitted[len(self.weights) :]
            # Fused, as many small parameters cost more time in the loop over them than in numbers.
            optimizer = torch.optim.Adam(fitted, lr=3e-3, fused=True)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
            for _ in range(iterations):
                given = self._evaluate(timesteps, weights, biases)
                error = (given - curves).square().mean(dim=(1, 2)).sum()
                gradients = torch.autograd.grad(error, fitted)
                for parameter, gradient in zip(fitted, gradients, strict=True):
                    parameter.grad = gradient
                optimizer.step()
                schedule.step()
        with torch.no_grad():
            for parameter, values in zip(current, fitted, strict=True):
                parameter.copy_(values)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.config}"

    def _check(self, timesteps: Tensor) -> None:
        """See that a band-limited encoding is not asked where it repeats itself."""
        if self.config.encoding == "geometric" or torch.compiler.is_compiling():
            return
        low, high = float(timesteps.min()), float(timesteps.max())
        # Flow matching starts at the very end.
        if low < 0 or high > self.config.num_timesteps:
            raise TimestepError(
                f"Timesteps {low:g} .. {high:g} are not within 0 .. {self.config.num_timesteps}, "
                "where the generators are smooth functions of t. Build the bank with a larger "
                "num_timesteps: attach(model, bank=partial(GeneratorBank, "
                "config=GeneratorConfig(num_timesteps=...)))."
            )

    def _evaluate(self, timesteps: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
        encoded = fourier_encoding(timesteps, self.frequencies)
        hidden = encoded.expand(len(self.names), *encoded.shape)
        # Mixed precision would round the scales of all layers to bfloat16.
        with torch.autocast(encoded.device.type, enabled=False):
            for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
                hidden = torch.baddbmm(bias, hidden, weight).relu()
            return torch.baddbmm(biases[-1], hidden, weights[-1])


def _frequencies(config: GeneratorConfig) -> Tensor:
    if config.encoding == "geometric":
        return geometric_frequencies(config.encoding_size)
    return band_limited_frequencies(config.encoding_size, config.num_timesteps)
