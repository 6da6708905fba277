"""Brevitas' `calibration_mode` on an attached model."""

import sys
from contextlib import ExitStack

from torch import nn

from tdq_plugin.attach import scale_bank
from tdq_plugin.calibrate import calibration, initialise_scales
from tdq_plugin.observe import TimestepObserver, results

__all__ = ["CalibrationMode"]


class CalibrationMode(nn.Module):
    """Observes all quantizers of a model while Brevitas calibrates, then sets its scale bank.

    `calibration_mode` looks for modules that have `collect_stats_steps`, which it raises when the
    block begins, and `init_scale`, which it calls when the block ends. `attach` adds this one to
    the model.

    Args:
        model: The attached model.

    Attributes:
        num_timesteps: Length of the diffusion process, as for `tdq_plugin.calibrate`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        # In a list, so that the model is no submodule of its own.
        self._owner = [model]
        self._stack = ExitStack()
        self._observers: dict[str, TimestepObserver] | None = None
        self._handled: BaseException | None = None
        self.num_timesteps = 1000

    @property
    def collect_stats_steps(self) -> int:
        """0; raised by Brevitas."""
        return 0

    @collect_stats_steps.setter
    def collect_stats_steps(self, steps: int) -> None:
        # A frozen bank is refused at the end: after an error here, Brevitas would not switch the
        # quantizers on again.
        observation = calibration(self._owner[0], num_timesteps=self.num_timesteps)
        self._observers = self._stack.enter_context(observation)
        self._handled = sys.exc_info()[1]

    def init_scale(self) -> None:
        """End the observation and set the scales, as `tdq_plugin.calibrate` does.

        An error within the block leaves the scales as they were.

        Raises:
            AdapterError: The bank is frozen.
            CalibrationError: No data were seen.
        """
        if self._observers is None:
            return
        observers, self._observers = self._observers, None
        self._stack.close()
        # Brevitas does not say how the block ended; an error here would replace the user's.
        handled, self._handled = self._handled, None
        if sys.exc_info()[1] is not handled:
            return
        observations = results(observers)
        initialise_scales(scale_bank(self._owner[0]), observations)
