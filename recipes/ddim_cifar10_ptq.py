"""Quantize the CIFAR-10 DDIM without retraining, as in the TDQ paper (arXiv 2306.02316).

What is decided here: scales come from the float model's own trajectories (PTQ4DM), the first and
last layer keep 8 bits, and 100 DDIM steps draw what is judged.
"""

from pathlib import Path

from tdq_plugin.recipes.plan import Plan
from tdq_plugin.recipes.ptq.full_size import (
    begin,
    calibration_data,
    measure,
    quantize,
    save_models,
)
from tdq_plugin.recipes.ptq.full_size_config import FullSizePTQConfig
from tdq_plugin.recipes.ptq.full_size_plan import plan_of
from tdq_plugin.recipes.ptq.full_size_report import write_results

__all__ = ["FullSizePTQConfig", "plan", "run"]

RECIPE = "ddim-cifar10-ptq"


def plan(config: FullSizePTQConfig) -> Plan:
    """Check framework, model and data, and say what a run would do."""
    return plan_of(RECIPE, config)


def run(config: FullSizePTQConfig) -> Path:
    """Run or resume the recipe; return the folder of `results.html` and `models/`."""
    run = begin(config)
    with run.accelerator.main_process_first():
        states = quantize(run, calibration_data(run))
    rows = measure(run, states)
    if run.accelerator.is_main_process:
        write_results(RECIPE, run, rows, save_models(run, states, RECIPE))
    run.accelerator.wait_for_everyone()
    return run.state.folder
