"""Quantize the digits DDIM by each method, sample with the result, and write a report.

What is decided here: every method starts from the same weights and the same calibration, on the
float model's own trajectories, and is measured on the same noise.
"""

from pathlib import Path

from tdq_plugin.recipes.calibration import collect, observe
from tdq_plugin.recipes.plan import Plan
from tdq_plugin.recipes.ptq.comparison import begin, measure, quantize
from tdq_plugin.recipes.ptq.comparison_plan import plan_of
from tdq_plugin.recipes.ptq.config import PTQConfig
from tdq_plugin.recipes.ptq.quantize import Start
from tdq_plugin.recipes.ptq.report import write_results

__all__ = ["PTQConfig", "plan", "run"]

RECIPE = "ddim-digits-ptq"


def plan(config: PTQConfig) -> Plan:
    """Check framework and model, and say what a run would do."""
    return plan_of(RECIPE, config)


def run(config: PTQConfig) -> Path:
    """Run or resume the recipe; return the folder with `report.html`, `report.json`, `model/`."""
    run = begin(config)
    data = collect(config.calibration, run.model, config.steps, config.seed)
    quantized = run.framework.prepare(run.model.unet, data, config.widths)
    observations = observe(quantized, data, run.model.scheduler, config.steps)
    start = Start(run.model, quantized, data, observations)
    states = quantize(run, start)
    measure(run, states)
    return write_results(RECIPE, run, start, states)
