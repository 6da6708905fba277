"""Stages of the full-size PTQ recipes: how a run starts, its scales, and its rows."""

from dataclasses import dataclass

import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler
from safetensors.torch import load_file, save_file

from tdq_plugin.files import atomic_file
from tdq_plugin.recipes.calibration import collect, observe
from tdq_plugin.recipes.correction import corrected, method_of
from tdq_plugin.recipes.evaluation.image_quality import require_features
from tdq_plugin.recipes.evaluation.sample_evaluation import SampleEvaluation
from tdq_plugin.recipes.evaluation.sample_rows import SampleRows
from tdq_plugin.recipes.evaluation.sampling import Denoiser, scheduler_with
from tdq_plugin.recipes.float_model import FloatModel, load_float_model, set_attention_heads
from tdq_plugin.recipes.frameworks import Framework, load_framework
from tdq_plugin.recipes.image_data import Images, load_all_images
from tdq_plugin.recipes.processes import start_processes
from tdq_plugin.recipes.ptq.full_size_config import FullSizePTQConfig
from tdq_plugin.recipes.ptq.method_states import MethodStates
from tdq_plugin.recipes.ptq.methods import check_framework
from tdq_plugin.recipes.ptq.quantize import Start, quantize_method
from tdq_plugin.recipes.ptq.weights import check_weights, set_weight_ranges
from tdq_plugin.recipes.run_state import RunState
from tdq_plugin.recipes.saved_model import save_model
from tdq_plugin.reconstruct import CalibrationSet
from tdq_plugin.study.schema import SizeBytes

__all__ = [
    "FLOAT",
    "FullSizePTQRun",
    "begin",
    "calibration_data",
    "load_model",
    "measure",
    "quantize",
    "save_models",
]

FLOAT = "float32"


@dataclass(frozen=True)
class FullSizePTQRun:
    """A run that has started.

    Attributes:
        config: Of the recipe.
        framework: The quantization framework.
        model: The float model, on the device of the run.
        images: Real images.
        accelerator: Its processes and devices.
        state: What is finished so far.
    """

    config: FullSizePTQConfig
    framework: Framework
    model: FloatModel
    images: Images
    accelerator: Accelerator
    state: RunState

    @property
    def sampler(self) -> DDIMScheduler:
        """The sampler, its timesteps set."""
        return scheduler_with(self.model.scheduler, self.config.evaluation.steps)


def load_model(config: FullSizePTQConfig) -> FloatModel:
    """The float model.

    Raises:
        ConfigError: There is none, or the configuration does not fit it.
    """
    model = load_float_model(config.model)
    scheduler_with(model.scheduler, config.evaluation.steps)
    if config.attention_heads is not None:
        set_attention_heads(model.unet, config.attention_heads)
    return model


def begin(config: FullSizePTQConfig) -> FullSizePTQRun:
    """Check what a run needs, then begin or resume it."""
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    require_features(config.evaluation.features)
    framework = load_framework(config.adapter)
    check_weights(config.weights, framework, config.adapter)
    check_framework(config.methods, framework, config.adapter)
    config.reconstruction.check(framework, config.adapter)
    accelerator = start_processes()
    with accelerator.main_process_first():
        model = load_model(config).to(accelerator.device)
        images = load_all_images(config.data, model.image_shape)
        state = RunState(config.run_folder, config.model_dump(mode="json"), config.changeable)
    return FullSizePTQRun(config, framework, model, images, accelerator, state)


def calibration_data(run: FullSizePTQRun) -> CalibrationSet:
    """Follow the float model's sampler, once; a restart reads what was kept."""
    path, config = run.state.folder / "calibration.safetensors", run.config
    if not path.exists():
        section, steps = config.calibration, config.evaluation.steps
        data = collect(section, run.model, steps, config.seed, config.batch_size)
        with atomic_file(path) as temporary:
            save_file({"samples": data.samples, "timesteps": data.timesteps}, temporary)
    kept, device = load_file(path), run.accelerator.device
    return CalibrationSet(kept["samples"].to(device), kept["timesteps"].to(device))


def quantize(run: FullSizePTQRun, data: CalibrationSet) -> MethodStates:
    """Give every method its scales, and keep them."""
    config = run.config
    quantized = run.framework.prepare(run.model.unet, data, config.widths)
    set_weight_ranges(quantized, config.weights)
    states = MethodStates(run.state, quantized.to(run.accelerator.device))
    unfinished = [name for name in config.methods if not states.finished(name)]
    if unfinished:
        observations = observe(
            quantized, data, run.model.scheduler, config.evaluation.steps, config.batch_size
        )
        start = Start(run.model, quantized, data, observations)
    for name in unfinished:
        states.reset()
        training, checkpoint = config.training_of(name), run.state.checkpoint_path(name)
        bank = quantize_method(start, name, training, checkpoint)
        states.save(name, bank, run.sampler.timesteps.tolist())
    return states


def measure(run: FullSizePTQRun, states: MethodStates) -> SampleRows:
    """Judge the float model and every method by their samples; fake quantization in float32."""
    rows = SampleRows(run.state.folder / "rows", run.config.evaluation)
    missing = rows.missing([FLOAT, *run.config.rows])
    if missing:
        section = run.config.evaluation
        evaluation = SampleEvaluation(section, run.accelerator, run.model, run.images)
        for name in missing:
            rows.measure(name, _denoiser(run, states, name), evaluation)
    return rows


def _denoiser(run: FullSizePTQRun, states: MethodStates, row: str) -> Denoiser:
    if row == FLOAT:
        return run.model.denoise
    method = method_of(row)
    denoiser = run.framework.simulate(states.load(method))
    if method == row:
        return denoiser
    with run.accelerator.main_process_first():
        return corrected(
            denoiser,
            run.model,
            run.sampler,
            run.state.correction_path(method),
            run.config.correction,
            run.config.seed,
            run.config.batch_size,
        )


def save_models(run: FullSizePTQRun, states: MethodStates, recipe: str) -> dict[str, SizeBytes]:
    """Save each method's model in the framework's form for deployment, below `models/`.

    Methods that cannot be deployed have none.
    """
    config = run.config
    extra = {"recipe": recipe, "bits": config.bits}
    return {
        name: save_model(
            run.framework,
            states.load(name),
            run.state.folder / "models" / name,
            run.model.unet,
            run.sampler,
            {**extra, "method": name},
            run.state.correction_path(name) if name in config.correction.methods else None,
        )
        for name in config.deployable_methods
    }
