"""Train the digits LDM with quantization by each method, and write a report.

What is decided here: the UNet is quantized, the autoencoder stays float. Every method starts from
the same float model and the same calibration, sees the same batches of latents, and trains weights
and scales together. Noise is compared in latents, samples as decoded images.
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

__all__ = ["LatentQATConfig", "plan", "run"]

RECIPE = "ldm-digits-qat"
MODEL = ASSETS / "ldm-digits"


class LatentQATConfig(ComparisonConfig):
    """Configuration of `ldm-digits-qat`."""

    model: str = str(MODEL)


def plan(config: LatentQATConfig) -> Plan:
    """Check framework, model and data, and say what a run would do."""
    return plan_of(RECIPE, config)


def run(config: LatentQATConfig) -> Path:
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
