"""The recipe `ldm-churches-qat` at its real size, on random weights: its plan and training steps.

    python benchmarks/ldm_churches_real_size.py --steps 1 --batch 1

Needs about 17 GB of memory and two minutes of a CPU. Pictures are random too, so that nothing is
downloaded. Prints the plan, the time of each stage and the largest memory of the process.
"""

import argparse
import resource
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tdq_plugin.recipes import find_recipe
from tdq_plugin.recipes.compvis.architecture import churches_pipeline
from tdq_plugin.recipes.image_data import load_images
from tdq_plugin.recipes.ldm_churches_qat import quantize
from tdq_plugin.recipes.qat.best_checkpoints import BestCheckpoints
from tdq_plugin.recipes.qat.full_size import train_best
from tdq_plugin.recipes.qat.stages import start


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        check(Path(folder), options)


def check(folder: Path, options: argparse.Namespace) -> None:
    """Make the model and pictures, plan, and train."""
    with timed("model"):
        torch.manual_seed(0)
        churches_pipeline().save_pretrained(folder / "model")
        write_pictures(folder / "pictures")
    recipe = find_recipe("ldm-churches-qat")
    config = recipe.configure(
        [
            f"model={folder / 'model'}",
            f"output={folder}",
            f"threads={options.threads}",
            f"data={{source: folder, location: {folder / 'pictures'}, validation_images: 1}}",
            "calibration={batches: 1, batch_size: 1}",
            f"training.iterations={options.steps}",
            f"training.batch_size={options.batch}",
            "validation.batches=1",
            "evaluation.features=digits",
        ]
    )
    with timed("plan"):
        print(recipe.plan(config))
    with timed("start"):
        run = start(config)
        model = quantize(config, run.model)
        best = BestCheckpoints(run.state.folder / "weights", keep=1)
        images = load_images(config.data, run.model.image_shape)
    with timed(f"calibration, {options.steps} training steps, validation, checkpoint"):
        train_best(run, model, *images, best)


def write_pictures(folder: Path) -> None:
    """Four pictures of noise."""
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (4, 256, 256, 3), dtype=np.uint8)
    for number, pixels in enumerate(noise):
        Image.fromarray(pixels).save(folder / f"{number}.png")


@contextmanager
def timed(stage: str) -> Iterator[None]:
    """Print how long a stage took, and the largest memory so far."""
    start = time.perf_counter()
    yield
    seconds = time.perf_counter() - start
    gigabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"{stage}: {seconds:.0f} s, at most {gigabytes:.1f} GB so far", flush=True)


if __name__ == "__main__":
    main()
