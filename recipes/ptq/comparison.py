"""Stages of the PTQ recipes that compare methods: how a run starts, its scales, its rows."""

from dataclasses import dataclass, field
from functools import partial

import torch
from tqdm.auto import tqdm

from tdq_plugin.errors import ConfigError
from tdq_plugin.recipes.correction import CORRECTED, corrected
from tdq_plugin.recipes.evaluation.denoiser import Evaluator
from tdq_plugin.recipes.evaluation.digits_evaluation import UNSEEN, check_measurable, make_evaluator
from tdq_plugin.recipes.evaluation.sampling import Denoiser, offset_of
from tdq_plugin.recipes.float_model import FloatModel, load_float_model
from tdq_plugin.recipes.frameworks import Framework, load_framework
from tdq_plugin.recipes.ptq.config import PTQConfig
from tdq_plugin.recipes.ptq.method_states import MethodStates
from tdq_plugin.recipes.ptq.methods import check_framework
from tdq_plugin.recipes.ptq.quantize import Start, quantize_method
from tdq_plugin.recipes.run_state import RunState

__all__ = ["ComparisonRun", "begin", "check_unseen", "measure", "quantize"]


@dataclass(frozen=True)
class ComparisonRun:
    """A run that has started.

    Attributes:
        config: Of the recipe.
        framework: The quantization framework.
        model: The float model.
        state: What is finished so far.
        evaluator: What every method is measured on.
        deployed: Methods in the framework's form for deployment, as far as they were needed.
    """

    config: PTQConfig
    framework: Framework
    model: FloatModel
    state: RunState
    evaluator: Evaluator
    deployed: dict[str, Denoiser] = field(default_factory=dict)

    def deploy(self, states: MethodStates, name: str) -> Denoiser:
        """A method's deployed model; made once, as some frameworks take seconds for it."""
        if name not in self.deployed:
            self.deployed[name] = self.framework.deploy(states.load(name))
        return self.deployed[name]


def begin(config: PTQConfig) -> ComparisonRun:
    """Load the float model and draw its images, or resume a run."""
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    framework = load_framework(config.adapter)
    config.learns_rounding(framework)
    check_framework(config.methods, framework, config.adapter)
    config.reconstruction.check(framework, config.adapter)
    model = load_float_model(config.model)
    check_measurable(model)
    check_unseen(config, model)
    state = RunState(config.run_folder, config.model_dump(mode="json"), config.changeable)
    evaluator = make_evaluator(
        config.evaluation, config.steps, model, config.model, config.output / "float-images"
    )
    return ComparisonRun(config, framework, model, state, evaluator)


def check_unseen(config: PTQConfig, model: FloatModel) -> None:
    """See that calibration leaves out the timesteps of the test between those of the sampler.

    Raises:
        ConfigError: It does not.
    """
    later = partial(offset_of, model.scheduler, config.steps)
    both = [shift for shift in config.calibration.shifts if later(shift) == later(UNSEEN)]
    if both:
        raise ConfigError(
            f"calibration.shifts: with steps = {config.steps}, timesteps are whole numbers, so "
            f"those of {both} are those of the test, {later(UNSEEN)} later than the sampler's. "
            "Leave these shifts out, or take fewer steps."
        )


def quantize(run: ComparisonRun, start: Start) -> MethodStates:
    """Give every method its scales, and keep them."""
    states = MethodStates(run.state, start.quantized)
    for name in run.config.methods:
        if not states.finished(name):
            states.reset()
            training = run.config.training_of(name, run.framework)
            bank = quantize_method(start, name, training, run.state.checkpoint_path(name))
            states.save(name, bank, run.evaluator.timesteps)
    return states


def measure(run: ComparisonRun, states: MethodStates) -> None:
    """Measure every row of the report, and keep it."""
    framework = run.framework
    for name in run.config.int8_methods:
        if run.state.result(name, framework.execution) is None:
            denoiser = run.deploy(states, name)
            _measure(run, name, framework.execution, denoiser)
    for name in run.config.fake_methods:
        if run.state.result(name, "fake") is None:
            denoiser = framework.simulate(states.load(name))
            _measure(run, name, "fake", denoiser)
    for name in run.config.correction.methods:
        row = name + CORRECTED
        if run.state.result(row, framework.execution) is None:
            denoiser = corrected(
                run.deploy(states, name),
                run.model,
                run.evaluator.scheduler,
                run.state.correction_path(name),
                run.config.correction,
                run.config.seed,
            )
            _measure(run, row, framework.execution, denoiser, only_sampler=True)


def _measure(
    run: ComparisonRun, name: str, execution: str, denoiser: Denoiser, only_sampler: bool = False
) -> None:
    title = f"{run.config.rows[name]}, {execution}: images"
    with tqdm(total=run.config.evaluation.samples, desc=title, unit="image") as progress:
        result = run.evaluator.evaluate(denoiser, progress.update, only_sampler)
        run.state.save_result(name, result, execution)
