"""Train the digits DDIM with quantization by each method, and write a report.

What is decided here: every method starts from the same float model and the same calibration, sees
the same batches, and trains weights and scales together.
"""

from pathlib import Path

from tdq_plugin.recipes.plan import Plan
from tdq_plugin.recipes.qat_comparison import (
    collect,
    evaluator_of,
    measure,
    objective_of,
    observe,
    plan_of,
    train_method,
)
from tdq_plugin.recipes.qat_config import ComparisonConfig
from tdq_plugin.recipes.qat_report import write_results
from tdq_plugin.recipes.qat_stages import start

__all__ = ["DigitsQATConfig", "plan", "run"]

RECIPE = "ddim-digits-qat"
MODEL = Path(__file__).parent / "assets" / "ddim-digits"


class DigitsQATConfig(ComparisonConfig):
    """Configuration of `ddim-digits-qat`."""

    model: str = str(MODEL)


def plan(config: DigitsQATConfig) -> Plan:
    """Check model and data, and say what a run would do."""
    return plan_of(RECIPE, config)


def run(config: DigitsQATConfig) -> Path:
    """Run or resume the recipe; return the folder with `report.html` and `report.json`."""
    run = start(config)
    points = collect(config, run.model)
    observations = observe(config, run.model, points)
    objective = objective_of(config, run.model, points)
    for name in config.methods:
        train_method(run, name, observations, objective)
        run.accelerator.wait_for_everyone()
    if run.accelerator.is_main_process:
        evaluator = evaluator_of(config, run.model)
        measure(run, evaluator)
        write_results(RECIPE, run, observations, evaluator)
    run.accelerator.wait_for_everyone()
    run.accelerator.end_training()
    return run.state.folder
