"""A full-size PTQ recipe on a random-weight model of the real size: its plan, scales, int8 images.

    python benchmarks/ptq_real_size.py ddim-cifar10-ptq
    python benchmarks/ptq_real_size.py ldm-churches-ptq

The configuration is the real one; only trajectories, iterations and samples are few. Nothing is
downloaded. Prints the plan, the time of each stage and the largest memory of the process.
"""

import argparse
import resource
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from int8_latency import MODELS

from tdq_plugin.recipes import find_recipe
from tdq_plugin.recipes.compvis.architecture import churches_pipeline
from tdq_plugin.recipes.evaluation.sampling import sample
from tdq_plugin.recipes.ptq.full_size import begin, calibration_data, quantize, save_models

RECIPES = ("ddim-cifar10-ptq", "ldm-churches-ptq")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", choices=RECIPES)
    parser.add_argument("--iterations", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2, help="of the sampler")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--granularity", choices=("network", "block"), default="network")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        check(Path(folder), options)


def check(folder: Path, options: argparse.Namespace) -> None:
    """Make the model, plan, quantize, and draw on integer kernels."""
    recipe = find_recipe(options.recipe)
    torch.manual_seed(0)
    with timed("model"):
        pipeline(options.recipe).save_pretrained(folder / "model")
    common = [f"model={folder / 'model'}", f"output={folder}", f"threads={options.threads}"]
    digits = "data={source: digits}"
    with timed("plan"):
        print(recipe.plan(recipe.configure([*common, digits])))
    few = [
        "methods=[tdq]",
        "calibration.images=2",
        f"reconstruction.iterations={options.iterations}",
        f"reconstruction.batch_size={options.batch}",
        f"reconstruction.granularity={options.granularity}",
        f"evaluation.steps={options.steps}",
        "evaluation.features=digits",
    ]
    run = begin(recipe.configure([*common, digits, *few]))
    with timed("calibration data"):
        data = calibration_data(run)
    with timed(f"observation, {options.iterations} training steps a block"):
        states = quantize(run, data)
    with timed("int8 model saved"):
        print(save_models(run, states, options.recipe))
    with timed("2 images on int8 kernels"):
        denoiser = run.framework.deploy(states.load("tdq"))
        noise = torch.randn(2, *run.model.latent_shape)
        images = sample(denoiser, run.sampler, noise, decode=run.model.decode)
    print(f"images {tuple(images.shape)}, finite: {bool(images.isfinite().all())}")


def pipeline(recipe: str) -> DDPMPipeline:
    """The recipe's model with random weights."""
    if recipe == "ldm-churches-ptq":
        return churches_pipeline()
    return DDPMPipeline(UNet2DModel(**MODELS["ddpm-cifar10"]), DDPMScheduler())


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Print how long a stage took, and the memory so far."""
    start = time.perf_counter()
    yield
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"{what}: {time.perf_counter() - start:.1f} s, peak memory {peak:.2f} GB", flush=True)


if __name__ == "__main__":
    main()
