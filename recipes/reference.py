"""The float model's own images, drawn once and kept: every run with the same noise shares them."""

import hashlib
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from tdq_plugin.files import atomic_file

__all__ = ["cached_images"]


def cached_images(folder: Path, key: str, weights: Path, draw: Callable[[], Tensor]) -> Tensor:
    """Load images, or draw and keep them.

    Args:
        folder: Where to keep them.
        key: What the images depend on besides the model.
        weights: The model's weights; part of the key by their content.
        draw: Draws the images, shape `(N, C, H, W)`.
    """
    digest = hashlib.sha256(weights.read_bytes() + key.encode()).hexdigest()[:16]
    path = folder / f"{digest}.safetensors"
    if path.exists():
        return load_file(path)["images"]
    images = draw()
    with atomic_file(path) as temporary:
        save_file({"images": images.contiguous()}, temporary)
    return images
