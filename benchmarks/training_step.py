"""Time of a training step: TDQ's generators against LSQ's constants, on one prepared model.

    python benchmarks/training_step.py --batch 1 4 --rounds 10

Weights are random: the time does not depend on them. A step is forward, backward, clipping, AdamW
and the average, as in the recipes; every number is the median of paired ratios to LSQ.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler, UNet2DModel
from int8_latency import MODELS
from torch import nn

import tdq_plugin as tdq
from tdq_plugin.recipes.config import CONFIG_FOLDER, load_config
from tdq_plugin.recipes.ddim_cifar10_qat import CifarQATConfig
from tdq_plugin.recipes.evaluation.sampling import image_shape
from tdq_plugin.recipes.frameworks import load_framework
from tdq_plugin.recipes.objectives import NoisedImages, Objective
from tdq_plugin.recipes.qat.methods import METHODS, apply_method, calibrate_bank
from tdq_plugin.recipes.qat.training import Training
from tdq_plugin.reconstruct import CalibrationSet
from tdq_plugin.study.latency import paired_ratios

REFERENCE = "lsq"


def main() -> None:
    """Measure and print."""
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    unet = UNet2DModel(**MODELS[options.model]).eval()
    for batch in options.batch:
        steps = {name: step(unet, name, batch) for name in (REFERENCE, *options.methods)}
        for name, ratio in paired_ratios(steps, REFERENCE, options.rounds).items():
            quartiles = f"[{ratio['q25']:.3f}, {ratio['q75']:.3f}]"
            print(f"{options.model}, batch {batch}: {name:14s} {ratio['median']:.3f} {quartiles}")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="ddpm-cifar10")
    parser.add_argument("--methods", nargs="+", default=["tdq"], choices=METHODS)
    parser.add_argument("--batch", nargs="+", type=int, default=[4])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def step(unet: UNet2DModel, name: str, batch_size: int) -> Callable[[], Any]:
    """A call that makes one training step of a method."""
    config = load_config(CifarQATConfig, CONFIG_FOLDER / "ddim-cifar10-qat.yaml")
    section = config.training.model_copy(update={"batch_size": batch_size})
    points = CalibrationSet(torch.zeros(2, *image_shape(unet)), torch.tensor([1.0, 2.0]))
    model = load_framework("torch_ao").prepare(unet, points, config.widths)
    apply_method(model, METHODS[name])
    images = torch.rand(16, *image_shape(unet)) * 2 - 1
    objective = Objective(NoisedImages(images, DDIMScheduler(), batch_size, seed=0))
    calibrate(model, name, objective)
    rate = config.scale_learning_rate
    training = Training(model, Accelerator(cpu=True), section, rate, {}, seed=0)
    return lambda: training.advance(objective)


def calibrate(model: nn.Module, name: str, objective: Objective) -> None:
    """Start the scales from one batch."""
    batch = objective.batch(0, slice(None))
    data = [(batch.samples, batch.timesteps)]
    observations = tdq.calibrate(model.eval(), data, samples=64, warm_start=False)
    calibrate_bank(model, METHODS[name], observations)


if __name__ == "__main__":
    main()
