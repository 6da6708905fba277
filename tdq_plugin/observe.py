"""Per-timestep statistics of one activation, mergeable across batches and processes."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tdq_plugin.errors import CalibrationError

__all__ = ["Observation", "TimestepObserver", "results"]


@dataclass(frozen=True, eq=False)
class Observation:
    """What was seen in the bins of timesteps that had any data; N of them.

    Attributes:
        timesteps: Mean timestep of each bin, shape `(N,)`.
        limits: Smallest and largest value, shape `(N, 2)`.
        deviation: Standard deviation, shape `(N,)`.
        values: A uniform sample of the values, shape `(N, K)`.
    """

    timesteps: Tensor
    limits: Tensor
    deviation: Tensor
    values: Tensor


class TimestepObserver:
    """Minimum, maximum, moments and a uniform sample of the values, for each bin of timesteps.

    Every value draws a key from an exponential clock and the K smallest keys are kept: a uniform
    sample of all values seen, whatever the order, and the union of two observers' samples is the
    sample of the union.

    Args:
        name: The quantizer's name, for messages.
        num_timesteps: Timesteps lie in `[0, num_timesteps)`.
        bins: Number of equal intervals of timesteps.
        samples: Values kept per bin (K).
        seed: Seed of the sampling.
    """

    def __init__(
        self,
        name: str,
        num_timesteps: int = 1000,
        bins: int = 50,
        samples: int = 2048,
        seed: int = 0,
    ) -> None:
        self.name, self.num_timesteps, self.bins = name, num_timesteps, bins
        self.generator = torch.Generator().manual_seed(seed)
        self.limits = torch.tensor([[torch.inf, -torch.inf]]).repeat(bins, 1)
        # Count of values, sum, sum of squares; count of samples, sum of timesteps.
        self.moments = torch.zeros(bins, 5, dtype=torch.float64)
        self.keys = torch.full((bins, samples), torch.inf)
        self.values = torch.zeros(bins, samples)

    def update(self, x: Tensor, timesteps: Tensor) -> None:
        """Add a batch.

        Args:
            x: Activation, shape `(B * k, ...)`.
            timesteps: Shape `(B,)`, or `(1,)` for all samples.

        Raises:
            CalibrationError: `x` has values that are not finite or does not hold the samples along
            dimension 0, or t is outside the process.
        """
        x, timesteps = x.detach().float().cpu(), timesteps.cpu()
        if x.shape[0] % timesteps.shape[0]:
            raise CalibrationError(
                f"The input of {self.name!r} has the shape {tuple(x.shape)}, whose first dimension "
                f"does not hold the {timesteps.shape[0]} samples of the batch. Samples must lie "
                "along dimension 0, batch-major; let a layer that sees something else stay float."
            )
        if not torch.stack(x.aminmax()).isfinite().all():
            raise CalibrationError(
                f"The input of {self.name!r} has NaN or infinite values at timestep "
                f"{timesteps.tolist()[:5]}. Check the model and the calibration data."
            )
        bins = (timesteps * (self.bins / self.num_timesteps)).floor().long()
        if bins.min() < 0 or bins.max() >= self.bins:
            raise CalibrationError(_outside(timesteps, self.num_timesteps))
        groups = x.reshape(timesteps.shape[0], -1)
        for index in bins.unique().tolist():
            chosen = bins == index
            self._add(index, groups[chosen].reshape(-1), timesteps[chosen])

    def merge(self, other: "TimestepObserver") -> None:
        """Add what another observer of the same quantizer has seen."""
        ours, theirs = (
            f"{observer.num_timesteps} timesteps of {observer.name!r} with {observer.bins} bins"
            for observer in (self, other)
        )
        if ours != theirs:
            raise CalibrationError(f"An observer of {theirs} cannot be merged into one of {ours}.")
        self.limits[:, 0] = torch.minimum(self.limits[:, 0], other.limits[:, 0])
        self.limits[:, 1] = torch.maximum(self.limits[:, 1], other.limits[:, 1])
        self.moments += other.moments
        for index in range(self.bins):
            self._keep(index, other.keys[index], other.values[index])

    def result(self) -> Observation:
        """The statistics of all bins that saw data.

        Raises:
            CalibrationError: No bin did.
        """
        seen = (self.moments[:, 0] > 0).nonzero().flatten()
        if len(seen) == 0:
            raise CalibrationError(
                f"The quantizer {self.name!r} saw no calibration data. Run the model inside "
                "tdq_plugin.calibration(model)."
            )
        count, total, squares, batches, times = self.moments[seen].unbind(1)
        variance = (squares / count - (total / count).square()).clamp(min=0)
        return Observation(
            timesteps=(times / batches).float(),
            limits=self.limits[seen],
            deviation=variance.sqrt().float(),
            values=self._filled(seen),
        )

    def _add(self, index: int, values: Tensor, timesteps: Tensor) -> None:
        low, high = values.aminmax()
        self.limits[index, 0] = torch.minimum(self.limits[index, 0], low)
        self.limits[index, 1] = torch.maximum(self.limits[index, 1], high)
        count = len(values)
        variance, mean = (float(value) for value in torch.var_mean(values, correction=0))
        sums = [count * mean, count * (variance + mean**2), float(timesteps.sum())]
        moments = [count, sums[0], sums[1], len(timesteps), sums[2]]
        self.moments[index] += torch.tensor(moments, dtype=torch.float64)
        # The smallest of n exponential keys are the first arrivals of a Poisson process of rate
        # n: no need to draw all n.
        draws = min(len(values), self.keys.shape[1])
        steps = torch.empty(draws).exponential_(generator=self.generator)
        chosen = torch.randint(len(values), (draws,), generator=self.generator)
        self._keep(index, steps.cumsum(0) / len(values), values[chosen])

    def _keep(self, index: int, keys: Tensor, values: Tensor) -> None:
        keys = torch.cat([self.keys[index], keys])
        values = torch.cat([self.values[index], values])
        order = keys.argsort()[: self.keys.shape[1]]
        self.keys[index], self.values[index] = keys[order], values[order]

    def _filled(self, seen: Tensor) -> Tensor:
        # A bin with fewer values than slots repeats its own values.
        slots = torch.arange(self.keys.shape[1])
        filled = self.keys[seen].isfinite().sum(dim=1, keepdim=True)
        return self.values[seen].gather(1, slots % filled)


def results(observers: Mapping[str, TimestepObserver]) -> dict[str, Observation]:
    """The results of all observers of a model, by quantizer name.

    Raises:
        CalibrationError: Some saw no data, or all.
    """
    unseen = [name for name, observer in observers.items() if not observer.moments[:, 0].any()]
    if 0 < len(unseen) < len(observers):
        layers = sorted({name.partition(".input")[0] for name in unseen})
        raise CalibrationError(
            f"No calibration batch reached {len(unseen)} of the model's {len(observers)} "
            f"quantizers: {unseen[:5]}. Calibrate with data for which the model runs these layers, "
            f"or let them stay float: float_layers={layers[:5]} where the model is prepared "
            "(name_blacklist in Brevitas' own layerwise_quantize)."
        )
    return {name: observer.result() for name, observer in observers.items()}


def _outside(timesteps: Tensor, num_timesteps: int) -> str:
    remedy = "Set num_timesteps to the length of the diffusion process."
    if timesteps.min() < 0:
        remedy = (
            "Timesteps are not negative: where the model takes such ones, as logarithms of noise "
            "levels, wrap it in a module whose forward takes shifted or scaled timesteps of 0 or "
            "more and computes the model's own from them."
        )
    return f"Timesteps {timesteps.tolist()[:5]} are not within 0 .. {num_timesteps}. {remedy}"
