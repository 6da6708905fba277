"""From a float UNet to one that trains with quantization, and back to files."""

import copy
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, fx, nn
from torch.ao.quantization.quantize_fx import prepare_qat_fx

import tdq_plugin as tdq
from tdq_plugin.adapters.torch_ao import tdq_backend_config, tdq_qconfig_mapping
from tdq_plugin.deploy import lower_to_int8, save_int8
from tdq_plugin.errors import ConfigError
from tdq_plugin.files import atomic_file, atomic_folder
from tdq_plugin.freeze import evaluate_table
from tdq_plugin.graph import copy_module_paths
from tdq_plugin.recipes.bits import Bits
from tdq_plugin.recipes.sampling import image_shape
from tdq_plugin.scales import FrozenBank

__all__ = [
    "copy_weights",
    "frozen",
    "load_weights",
    "lower",
    "prepare",
    "save_integer_model",
    "save_weights",
]


def prepare(
    unet: UNet2DModel,
    bits: Bits,
    float_layers: tuple[str, ...] = (),
    first_last_bits: int | None = 8,
) -> fx.GraphModule:
    """Trace a copy of the model, prepare it with torch.ao and attach; not calibrated yet.

    Args:
        unet: The float model; it stays as it is.
        bits: Of weights and activations.
        float_layers: Layers that stay float, as `tdq_qconfig_mapping` takes them.
        first_last_bits: Bits of the first and last layer that do not stay float.
    """
    unet = copy.deepcopy(unet).eval()
    samples = torch.zeros(2, *image_shape(unet), device=unet.device)
    example = (samples, torch.tensor([1.0, 2.0], device=unet.device))
    graph = tdq.trace(unet, example)
    mapping = tdq_qconfig_mapping(
        graph,
        bits.activations,
        bits.weights,
        first_last_bits=first_last_bits,
        float_layers=float_layers,
    )
    prepared = prepare_qat_fx(graph.train(), mapping, example, backend_config=tdq_backend_config())
    copy_module_paths(graph.graph, prepared.graph)
    return tdq.attach(prepared).to(unet.device)


@contextmanager
def frozen(model: nn.Module, timesteps: Any) -> Iterator[nn.Module]:
    """For a while, the model samples: in evaluation mode, its scales frozen into a table."""
    bank, training = tdq.scale_bank(model), model.training
    model.scale_bank = FrozenBank(evaluate_table(bank, timesteps))
    try:
        yield model.eval()
    finally:
        model.scale_bank = bank
        model.train(training)


def save_weights(model: nn.Module, path: Path) -> None:
    """Save weights, weight scales and the scale bank."""
    state: dict[str, Tensor] = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in model.state_dict().items()
    }
    with atomic_file(path) as temporary:
        save_file(state, temporary)


def load_weights(model: nn.Module, path: Path) -> None:
    """Load what `save_weights` saved, into a model prepared in the same way."""
    model.load_state_dict(load_file(path))


def copy_weights(run: Path, method: str, bits: str, path: Path) -> None:
    """Copy what another run has saved of a method.

    Raises:
        ConfigError: The run has not trained this method, or with other bits.
    """
    source, config = run / "weights" / f"{method}.safetensors", run / "config.json"
    if not source.exists() or not config.exists():
        raise ConfigError(
            f"trained = {str(run)!r} has no weights of {method!r}: {source} does not exist. "
            "Give the folder of a finished run with this method."
        )
    other = json.loads(config.read_text())["bits"]
    if other != bits:
        raise ConfigError(f"trained = {str(run)!r} is a run with bits={other}, not {bits}.")
    with atomic_file(path) as temporary:
        shutil.copyfile(source, temporary)


def lower(model: fx.GraphModule) -> fx.GraphModule:
    """Put a frozen model on integer kernels; dynamic quantizers then measure each batch."""
    dynamic = any(quantizer.mode == "dynamic" for _, quantizer in tdq.named_quantizers(model))
    return lower_to_int8(model, activations="dynamic" if dynamic else "table")


def save_integer_model(
    folder: Path,
    model: fx.GraphModule,
    unet: UNet2DModel,
    scheduler: DDIMScheduler,
    recipe: str,
    correction: Path | None = None,
) -> int:
    """Save a trained model on integer kernels, frozen for the timesteps of its sampler.

    `unet` and `scheduler` hold the configurations to load `int8` with.

    Args:
        folder: Where to.
        model: The trained model, its scales not frozen or frozen for more timesteps.
        unet: The float model, for its configuration.
        scheduler: The sampler, its timesteps set.
        recipe: Noted in the file.
        correction: The model's output correction, to be saved with it.

    Returns:
        The size in bytes.
    """
    with frozen(model, scheduler), atomic_folder(folder) as temporary:
        lowered = lower(model.cpu())
        unet.save_config(temporary / "unet")
        scheduler.save_config(temporary / "scheduler")
        save_int8(lowered, temporary / "int8", extra={"recipe": recipe})
        if correction is not None:
            shutil.copy(correction, temporary / "output_correction.safetensors")
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
