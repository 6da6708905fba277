"""`calibrate`: observe activations per timestep and set every quantizer's scale from them."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tdq_plugin.attach import named_quantizers, scale_bank
from tdq_plugin.batch_layout import check_layout, fingerprints, holds_samples, next_places
from tdq_plugin.errors import AdapterError, CalibrationError
from tdq_plugin.evaluation_mode import evaluation_mode
from tdq_plugin.observe import Observation, TimestepObserver, results
from tdq_plugin.quantizer import ActivationQuantizer
from tdq_plugin.ranges import RangeMethod, search_range, search_scale
from tdq_plugin.scales.bank import ScaleBank, TrainableBank
from tdq_plugin.scales.tables import ConstantBank

__all__ = ["calibrate", "calibration", "initialise_scales"]


def calibrate(
    model: nn.Module,
    batches: Iterable[tuple[Any, ...] | dict[str, Any]],
    method: RangeMethod = "mse",
    warm_start: bool = True,
    **options: Any,
) -> dict[str, Observation]:
    """Run calibration batches through the model and set the scales.

    The model runs in evaluation mode, without dropout, with float activations and with weights as
    they are quantized.

    Args:
        model: An attached model.
        batches: Arguments of the model: tuples, dictionaries, or tuples that end with a dictionary
            of the arguments that are given by name. Timesteps may be mixed.
        method: How a range becomes a scale, see `tdq_plugin.ranges`.
        warm_start: Let the bank follow the observed ranges over t from the start; else it starts
            at the static scale for every t.
        **options: As for `calibration`.

    Returns:
        What was observed, by quantizer name.

    Raises:
        CalibrationError: No data, or none for some layer, values that are not finite, timesteps
            outside the process, a batch that is a bare tensor, or an activation that does not
            hold the samples along dimension 0, batch-major, which the first batch of several
            samples shows.
    """
    with calibration(model, **options) as observers, torch.no_grad():
        watch, batch = _watch_of(model), None
        for batch in batches:
            args, kwargs = _arguments(batch)
            model(*args, **kwargs)
            if not watch.layout_checked:
                watch.check_layout(model, args, kwargs)
        if batch is None:
            raise CalibrationError(
                "There are no batches. Give a list of them; a generator can be used only once."
            )
    observations = results(observers)
    initialise_scales(scale_bank(model), observations, method, warm_start)
    return observations


@contextmanager
def calibration(
    model: nn.Module, num_timesteps: int = 1000, bins: int = 50, samples: int = 2048
) -> Iterator[dict[str, TimestepObserver]]:
    """Within the block, the activations of every call of the model are float and are observed.

    The model is in evaluation mode meanwhile; afterwards its training flags are as before.

    Args:
        model: An attached model.
        num_timesteps: Length of the diffusion process.
        bins: Number of equal intervals of timesteps that get statistics of their own.
        samples: Values kept per quantizer and bin.

    Yields:
        The observers by quantizer name; `initialise_scales` turns their results into scales.
    """
    quantizers = dict(named_quantizers(model))
    bank = scale_bank(model)
    observers = {
        name: TimestepObserver(name, num_timesteps, bins, samples, seed=row)
        for row, name in enumerate(quantizers)
    }
    modes = {name: quantizer.mode for name, quantizer in quantizers.items()}
    watch = _Watch(bank, quantizers)
    handle = model.register_forward_hook(
        lambda _, args, output: watch.end(observers, output is not None), always_call=True
    )
    model.scale_bank = watch
    for quantizer in quantizers.values():
        quantizer.mode = "observe"
    try:
        with evaluation_mode(model):
            yield observers
    finally:
        handle.remove()
        model.scale_bank = bank
        for name, quantizer in quantizers.items():
            quantizer.mode = modes[name]
            quantizer.observed.clear()


def initialise_scales(
    bank: ScaleBank,
    observations: dict[str, Observation],
    method: RangeMethod = "mse",
    warm_start: bool = True,
) -> None:
    """Set a bank's static scales and zero points, then let it follow the ranges over t.

    The static scale comes from the values of all timesteps together.

    Raises:
        AdapterError: The bank is frozen.
        CalibrationError: The timesteps are fractions of a process that is said to be longer.
    """
    if not isinstance(bank, TrainableBank):
        raise AdapterError(f"A {type(bank).__name__} cannot be calibrated: it is frozen.")
    if warm_start and not isinstance(bank, ConstantBank):
        _require_spread(next(iter(observations.values())).timesteps)
    static, curves = [], []
    for name, grid in zip(bank.names, bank.grids, strict=True):
        seen = observations[name]
        limits = torch.stack([seen.limits[:, 0].min(), seen.limits[:, 1].max()])[None]
        pooled = seen.values.reshape(1, -1)
        scale, zero_point = search_range(pooled, grid, method, limits=limits)
        static.append(torch.cat([scale, zero_point]))
        if bank.timestep_zero_point:
            scales, zeros = search_range(seen.values, grid, method, limits=seen.limits)
        else:
            zeros = zero_point.expand(len(seen.timesteps))
            scales = search_scale(seen.values, zeros, grid, method, limits=seen.limits)
        curves.append(torch.stack([scales, zeros]))
    scale, zero_point = torch.stack(static).unbind(1)
    bank.set_static(scale.to(bank.device), zero_point.to(bank.device))
    if warm_start:
        timesteps = next(iter(observations.values())).timesteps
        scales, zeros = torch.stack(curves).unbind(1)
        bank.warm_start(timesteps, scales, zeros)


def _require_spread(timesteps: Tensor) -> None:
    """See that t is not a fraction: all of a process would fall into the first bin, silently."""
    if len(timesteps) == 1 and 0 < float(timesteps) < 1:
        raise CalibrationError(
            f"All timesteps lie between 0 and 1, {float(timesteps):.3g} in the mean, so nothing "
            "can be seen to change with t. If the model takes t as a fraction, give the "
            "calibration and the bank's configuration num_timesteps=2."
        )


def _arguments(batch: tuple[Any, ...] | dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if not isinstance(batch, tuple | list | dict):
        raise CalibrationError(
            f"A batch is a {type(batch).__name__}. Give the calibration a list of batches, each a "
            "tuple (sample, timestep, ...) or a dictionary of the model's arguments."
        )
    if isinstance(batch, dict):
        return (), batch
    if batch and isinstance(batch[-1], dict):
        return tuple(batch[:-1]), batch[-1]
    return tuple(batch), {}


def _watch_of(model: nn.Module) -> "_Watch":
    watch = scale_bank(model)
    assert isinstance(watch, _Watch)
    return watch


class _Watch(ScaleBank):
    """Stands in for the bank during calibration: remembers t, gives scales that nobody reads.

    Attributes:
        layout_checked: Whether activations are known to hold samples along dimension 0.
    """

    def __init__(self, bank: ScaleBank, quantizers: dict[str, ActivationQuantizer]) -> None:
        super().__init__(dict(zip(bank.names, bank.grids, strict=True)))
        self._quantizers = quantizers
        self._device = bank.device
        self._timesteps = torch.empty(0)
        self._around: list[tuple[Tensor, list[list[Tensor]]]] = []
        self._fingerprints: dict[str, list[Tensor]] = {}
        self._observes = True
        self.layout_checked = False

    @property
    def device(self) -> torch.device:
        return self._device

    def rows(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        # Of a call around this one, if the model calls itself.
        self._around.append((self._timesteps, [[*q.observed] for q in self._quantizers.values()]))
        self._clear()
        self._timesteps = timesteps
        ones = torch.ones(len(self.names), timesteps.shape[0], device=timesteps.device)
        return ones, ones

    def end(self, observers: dict[str, TimestepObserver], succeeded: bool) -> None:
        """After a call, also one that failed: take what was observed, or forget it."""
        try:
            if succeeded:
                self._collect(observers)
        finally:
            self._clear()
            # Empty if the call failed before it asked for rows.
            timesteps, observed = self._around.pop() if self._around else (self._timesteps, [])
            if self._around:
                self._timesteps = timesteps
                for quantizer, kept in zip(self._quantizers.values(), observed, strict=True):
                    quantizer.observed.extend(kept)

    def _collect(self, observers: dict[str, TimestepObserver]) -> None:
        for name, quantizer in self._quantizers.items():
            for x in quantizer.observed if self._observes else ():
                observers[name].update(x, self._timesteps)
            if not self.layout_checked:
                seen = [fingerprints(x, len(self._timesteps)) for x in quantizer.observed]
                self._fingerprints[name] = seen

    def check_layout(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Run the batch that was seen last once more, its samples in other places."""
        samples, before = len(self._timesteps), dict(self._fingerprints)
        if samples == 1 or not holds_samples((args, kwargs), samples):
            return
        args, kwargs = next_places((args, kwargs), samples)
        self._observes = False
        try:
            model(*args, **kwargs)
        finally:
            self._observes = True
        check_layout(before, self._fingerprints)
        self._fingerprints.clear()
        self.layout_checked = True

    def _clear(self) -> None:
        for quantizer in self._quantizers.values():
            quantizer.observed.clear()
