"""Train the digits DDIM with quantization by each method, and write a report.

What is decided here: every method starts from the same float model and the same calibration, sees
the same batches, and trains weights and scales together.
"""

from pathlib import Path

from tdq_plugin.recipes.config import ASSETS
from tdq_plugin.recipes.plan import Plan
from tdq_plugin.recipes.qat.comparison import (
    begin,
    evaluator_of,
    measure,
    objective_of,
    train_method,
)
from tdq_plugin.recipes.qat.comparison_plan import plan_of
from tdq_plugin.recipes.qat.config import ComparisonConfig
from tdq_plugin.recipes.qat.report import write_results

__all__ = ["DigitsQATConfig", "plan", "run"]

RECIPE = "ddim-digits-qat"
MODEL = ASSETS / "ddim-digits"


class DigitsQATConfig(ComparisonConfig):
    """Configuration of `ddim-digits-qat`."""

    model: str = str(MODEL)


def plan(config: DigitsQATConfig) -> Plan:
    """Check framework, model and data, and say what a run would do."""
    return plan_of(RECIPE, config)


def run(config: DigitsQATConfig) -> Path:
    """Run or resume the recipe; return the folder with `report.html` and `report.json`."""
    comparison = begin(config)
    objective, accelerator = objective_of(comparison), comparison.run.accelerator
    for name in config.methods:
        train_method(comparison, name, objective)
        accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        evaluator = evaluator_of(comparison)
        measure(comparison, evaluator)
        write_results(RECIPE, comparison, evaluator)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return comparison.run.state.folder
