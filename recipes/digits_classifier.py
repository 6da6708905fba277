"""Train the small CNN whose features the studies measure digit samples with."""

import json
from pathlib import Path

import torch
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate, pad
from tqdm.auto import tqdm

from tdq_plugin.errors import ConfigError
from tdq_plugin.files import atomic_folder
from tdq_plugin.recipes.config import ASSETS, RecipeConfig
from tdq_plugin.recipes.digits import load_digits
from tdq_plugin.recipes.plan import Plan
from tdq_plugin.recipes.run_state import check_new_folder

__all__ = [
    "ClassifierConfig",
    "DigitClassifier",
    "accuracy",
    "load_classifier",
    "plan",
    "run",
    "split_digits",
]

COMMITTED = ASSETS / "digits-classifier"
WEIGHTS = "model.safetensors"


class ClassifierConfig(RecipeConfig):
    """Configuration of `digits-classifier`.

    Attributes:
        epochs: Passes over the training digits.
        batch_size: Images in a step.
        learning_rate: Peak of the one-cycle schedule.
        max_shift: Largest random shift of an image, in pixels.
        noise: Standard deviation of the Gaussian noise added to an image.
    """

    epochs: int = Field(gt=0)
    batch_size: int = Field(gt=0)
    learning_rate: float = Field(gt=0)
    max_shift: int = Field(ge=0)
    noise: float = Field(ge=0)


class DigitClassifier(nn.Module):
    """Classifies 16x16 digits in [-1, 1]; its 64 features are a space to compare digits in."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_convolution(1, 16),
            *_convolution(16, 32),
            nn.MaxPool2d(2),
            *_convolution(32, 32),
            nn.MaxPool2d(2),
            *_convolution(32, 48),
            nn.Flatten(),
            nn.Linear(48 * 4 * 4, 64),
            nn.ReLU(),
        )
        self.head = nn.Linear(64, 10)

    def features(self, images: Tensor) -> Tensor:
        """Map images `(N, 1, H, W)` to the penultimate layer's activations `(N, 64)`.

        Images of another size than 16x16 are resized.
        """
        if images.shape[2:] != (16, 16):
            images = interpolate(images, (16, 16), mode="bilinear", antialias=True)
        return self.body(images)

    def forward(self, images: Tensor) -> Tensor:
        """Map images `(N, 1, H, W)` to class logits `(N, 10)`."""
        return self.head(self.features(images))


def _convolution(channels_in: int, channels_out: int) -> list[nn.Module]:
    return [
        nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(),
    ]


def split_digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return the 4,500 training digits and the 500 held-out ones (every 10th), with labels."""
    images, labels = load_digits(16)
    held_out = torch.arange(len(images)) % 10 == 0
    return (images[~held_out], labels[~held_out]), (images[held_out], labels[held_out])


def plan(config: ClassifierConfig) -> Plan:
    """Check the run folder, and say what a run would do."""
    check_new_folder(config.run_folder)
    (images, _), (held_out, _) = split_digits()
    lines = {
        "data": f"{len(images):,} training digits, {len(held_out):,} held out",
        "steps": f"{_steps(config, len(images)):,} of {config.batch_size} images",
        "results": str(config.run_folder),
    }
    return Plan("tdq run digits-classifier", lines)


def run(config: ClassifierConfig) -> Path:
    """Train, save `model.safetensors` and `config.json`; return the folder."""
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    check_new_folder(config.run_folder)
    (images, labels), held_out = split_digits()
    model = DigitClassifier()
    steps = _steps(config, len(images))
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.learning_rate, steps)
    for _ in tqdm(range(steps), desc="classifier"):
        index = torch.randint(len(images), (config.batch_size,))
        batch = augment(images[index], config.max_shift, config.noise)
        cross_entropy(model(batch), labels[index], label_smoothing=0.05).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    _save(config, model, accuracy(model, *held_out))
    return config.run_folder


def _steps(config: ClassifierConfig, images: int) -> int:
    return config.epochs * images // config.batch_size


def augment(images: Tensor, max_shift: int, noise: float) -> Tensor:
    """Shift every image by up to `max_shift` pixels on black, and add Gaussian noise."""
    size = images.shape[-1]
    padded = pad(images, [max_shift] * 4, value=-1.0)
    windows = padded.unfold(2, size, 1).unfold(3, size, 1)
    rows, columns = torch.randint(2 * max_shift + 1, (2, len(images)))
    shifted = windows[torch.arange(len(images)), :, rows, columns]
    return shifted + noise * torch.randn_like(shifted)


@torch.no_grad()
def accuracy(model: DigitClassifier, images: Tensor, labels: Tensor) -> float:
    """Share of the images `(N, 1, 16, 16)` that the model, in eval mode, labels correctly."""
    return (model.eval()(images).argmax(1) == labels).float().mean().item()


def _save(config: ClassifierConfig, model: DigitClassifier, held_out_accuracy: float) -> None:
    values = config.model_dump(mode="json")
    overrides = " ".join(f"{key}={value}" for key, value in values.items())
    description = {
        "command": f"tdq run digits-classifier {overrides}",
        "seed": config.seed,
        "held_out_accuracy": round(held_out_accuracy, 4),
        "held_out_images": 500,
    }
    with atomic_folder(config.run_folder, marker=WEIGHTS) as temporary:
        save_file(model.state_dict(), temporary / WEIGHTS)
        (temporary / "config.json").write_text(json.dumps(description, indent=2) + "\n")


def load_classifier(folder: Path | None = None) -> DigitClassifier:
    """Load a trained classifier in eval mode.

    Args:
        folder: A run folder of this recipe; by default the weights that come with the recipe.

    Raises:
        ConfigError: The folder has no weights.
    """
    weights = (folder or COMMITTED) / WEIGHTS
    if not weights.is_file():
        raise ConfigError(f"{weights} does not exist. Train it: tdq run digits-classifier.")
    model = DigitClassifier()
    model.load_state_dict(load_file(weights))
    return model.eval().requires_grad_(False)
