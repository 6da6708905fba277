"""Quantize the digits LDM by each method, sample with the result, and write a report.

What is decided here: the UNet is quantized on latents of the float model's own trajectories and
its errors are those of latents; the autoencoder stays float, and images are what it decodes.
"""

from pathlib import Path

from tdq_plugin.recipes.calibration import collect, observe
from tdq_plugin.recipes.config import ASSETS
from tdq_plugin.recipes.plan import Plan
from tdq_plugin.recipes.ptq.comparison import begin, measure, quantize
from tdq_plugin.recipes.ptq.comparison_plan import plan_of
from tdq_plugin.recipes.ptq.config import PTQConfig
from tdq_plugin.recipes.ptq.quantize import Start
from tdq_plugin.recipes.ptq.report import write_results

__all__ = ["LatentPTQConfig", "plan", "run"]

RECIPE = "ldm-digits-ptq"
MODEL = ASSETS / "ldm-digits"


class LatentPTQConfig(PTQConfig):
    """Configuration of `ldm-digits-ptq`."""

    model: Path = MODEL


def plan(config: LatentPTQConfig) -> Plan:
    """Check framework and model, and say what a run would do."""
    return plan_of(RECIPE, config)


def run(config: LatentPTQConfig) -> Path:
    """Run or resume the recipe; return the folder with `report.html`, `report.json`, `model/`."""
    run = begin(config)
    data = collect(config.calibration, run.model, config.steps, config.seed)
    quantized = run.framework.prepare(run.model.unet, data, config.widths)
    observations = observe(quantized, data, run.model.scheduler, config.steps)
    start = Start(run.model, quantized, data, observations)
    states = quantize(run, start)
    measure(run, states)
    return write_results(RECIPE, run, start, states)
