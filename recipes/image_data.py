"""Training images: the bundled digits, a folder, or a dataset of the Hugging Face hub."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import Field, model_validator
from torch import Tensor

from tdq_plugin.errors import ConfigError
from tdq_plugin.extras import INSTALL
from tdq_plugin.recipes.config import Section
from tdq_plugin.recipes.digits import load_digits

__all__ = ["DataSection", "ImageSection", "Images", "load_all_images", "load_images"]

_ENDINGS = {".bmp", ".jpeg", ".jpg", ".png", ".webp"}


class ImageSection(Section):
    """Where real images come from.

    Attributes:
        source: `digits` (bundled), `folder` (all images below it), or `hub`.
        location: The folder, or the dataset's name on the hub.
        split: Split of a hub dataset.
        column: Column of a hub dataset that holds the images.
    """

    source: Literal["digits", "folder", "hub"]
    location: str = ""
    split: str = "train"
    column: str = "image"

    @model_validator(mode="after")
    def _has_a_location(self) -> "ImageSection":
        if self.source != "digits" and not self.location:
            raise ValueError(f"source={self.source} needs a location: the folder, or the dataset")
        return self


class DataSection(ImageSection):
    """Images to train with.

    Attributes:
        flip: Mirror images at random.
        validation_images: Held out of training for the validation loss.
    """

    flip: bool = False
    validation_images: int = Field(gt=0)


class Images:
    """Images by number, read when they are asked for.

    Args:
        read: From a number to an image `(C, H, W)` in [-1, 1].
        numbers: Which of the images these are.
    """

    def __init__(self, read: Callable[[int], Tensor], numbers: Tensor) -> None:
        self.read, self.numbers = read, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, indices: Tensor) -> Tensor:
        return torch.stack([self.read(int(number)) for number in self.numbers[indices]])


def load_images(section: DataSection, shape: tuple[int, int, int]) -> tuple[Images, Images]:
    """Images for training and for validation.

    Args:
        section: What to load.
        shape: Channels, height and width that the model takes; images are cropped to a square
            and resized.

    Raises:
        ConfigError: The source is missing, or has too few images.
    """
    read, count = _source(section, shape)
    if count <= section.validation_images:
        raise ConfigError(
            f"data.source = {section.source!r} has {count} images at {section.location!r}, and "
            f"data.validation_images = {section.validation_images} leave none for training. "
            "Give more images, or hold out fewer."
        )
    shuffled = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    held_out, training = shuffled.split(
        [section.validation_images, count - section.validation_images]
    )
    return Images(read, training), Images(read, held_out)


def load_all_images(section: ImageSection, shape: tuple[int, int, int]) -> Images:
    """All images of a source, in its order.

    Args:
        section: What to load.
        shape: Channels, height and width that the images are brought to.

    Raises:
        ConfigError: The source is missing or empty.
    """
    read, count = _source(section, shape)
    if count == 0:
        raise ConfigError(
            f"data.source = {section.source!r} has no images at {section.location!r}. "
            f"Give a folder with {', '.join(sorted(_ENDINGS))}, or a dataset of the hub."
        )
    return Images(read, torch.arange(count))


Source = tuple[Callable[[int], Tensor], int]


def _source(section: ImageSection, shape: tuple[int, int, int]) -> Source:
    kinds = {"digits": _digits, "folder": _folder, "hub": _hub}
    return kinds[section.source](section, shape)


def _digits(section: ImageSection, shape: tuple[int, int, int]) -> Source:
    images, _ = load_digits(shape[1])
    return lambda number: images[number].expand(shape), len(images)


def _folder(section: ImageSection, shape: tuple[int, int, int]) -> Source:
    root = Path(section.location)
    if not root.is_dir():
        raise ConfigError(f"data.location = {section.location!r}: there is no such folder.")
    files = sorted(path for path in root.rglob("*") if path.suffix.lower() in _ENDINGS)

    def read(number: int) -> Tensor:
        with Image.open(files[number]) as image:
            return _as_tensor(image, shape)

    return read, len(files)


def _hub(section: ImageSection, shape: tuple[int, int, int]) -> Source:
    if find_spec("datasets") is None:
        raise ConfigError(
            f"data.location = {section.location!r} is on the hub, and the package datasets is "
            f"missing. {INSTALL.format('hub')}."
        )
    from datasets import load_dataset

    try:
        rows: Any = load_dataset(section.location, split=section.split)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"The dataset {section.location!r} cannot be loaded: {str(error).splitlines()[0]}."
        ) from error
    if section.column not in rows.column_names:
        raise ConfigError(
            f"data.column = {section.column!r} is not in {section.location!r}; it has "
            f"{', '.join(rows.column_names)}."
        )
    return lambda number: _as_tensor(rows[number][section.column], shape), len(rows)


def _as_tensor(image: Image.Image, shape: tuple[int, int, int]) -> Tensor:
    channels, height, width = shape
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.convert("L" if channels == 1 else "RGB").crop(
        (left, top, left + side, top + side)
    )
    if square.size != (width, height):
        square = square.resize((width, height), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(square)).reshape(height, width, channels)
    return pixels.permute(2, 0, 1).float() / 127.5 - 1
