"""What the recipes ask of a quantization framework, and one module for each that answers."""

from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Protocol

from diffusers import UNet2DModel
from torch import nn

from tdq_plugin.errors import ConfigError
from tdq_plugin.extras import INSTALL
from tdq_plugin.recipes.bits import Bits
from tdq_plugin.recipes.evaluation.sampling import Denoiser
from tdq_plugin.reconstruct import CalibrationSet

__all__ = ["FRAMEWORKS", "Framework", "FrameworkName", "load_framework"]

FrameworkName = Literal["torch_ao", "pt2e", "brevitas", "nncf"]
_EXTRAS = {
    "torch_ao": "torch-ao",
    "pt2e": "pt2e",
    "brevitas": "brevitas",
    "nncf": "nncf,openvino",
}
FRAMEWORKS = tuple(_EXTRAS)


class Framework(Protocol):
    """One framework's side of the recipes.

    Attributes:
        execution: How a deployed model runs: on integer kernels, or as fake quantization.
        latency_unit: What the latencies of the report are relative to.
        learns_rounding: Whether reconstruction can learn the rounding of the weights; else they
            keep the framework's own.
        has_blocks: Whether a prepared model is a graph, which can be trained block by block.
        keeps_dropout: Whether a prepared model drops out in training mode.
        moves_zero_points: Whether a deployed model's zero points may depend on t.
    """

    execution: Literal["int8", "fake"]
    latency_unit: str
    learns_rounding: bool
    has_blocks: bool
    keeps_dropout: bool
    moves_zero_points: bool

    def prepare(self, model: UNet2DModel, data: CalibrationSet, bits: Bits) -> nn.Module:
        """The framework's prepare step, then `tdq.attach`, on the model's device; not calibrated.

        Args:
            model: The float model; it stays as it is.
            data: Two samples or more, for frameworks that look at activations themselves.
            bits: Of weights and activations.
        """

    def simulate(self, model: nn.Module) -> Denoiser:
        """The fake-quantized model, ready for many calls."""

    def deploy(self, model: nn.Module) -> Denoiser:
        """The frozen model as a user of the framework runs it; its scales are a table's."""

    def deploy_dynamic(self, model: nn.Module) -> Denoiser | None:
        """The same with input-dependent scales, for comparison, where the framework has them."""

    def deploy_float(self, model: UNet2DModel, data: CalibrationSet) -> Denoiser:
        """The float model in the same engine."""

    def save(self, model: nn.Module, folder: Path, extra: dict[str, Any]) -> None:
        """Save the frozen model, whose scales are a table's, in the form for deployment."""


def load_framework(name: FrameworkName) -> Framework:
    """The framework of a name; imports it.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        module = import_module(f"{__name__}.{name}")
    except ImportError as error:
        raise ConfigError(
            f"adapter = {name!r} is not available: {error}. {INSTALL.format(_EXTRAS[name])}."
        ) from error
    framework: Framework = module.FRAMEWORK
    return framework
