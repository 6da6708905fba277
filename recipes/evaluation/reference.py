"""The float model's own images, drawn once and kept: every run with the same noise shares them."""

import hashlib
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock
from safetensors.torch import load_file, save_file
from torch import Tensor

from tdq_plugin.files import atomic_file

__all__ = ["cached_images"]


def cached_images(folder: Path, key: str, model: Path, draw: Callable[[], Tensor]) -> Tensor:
    """Load images, or draw and keep them; if another process is drawing them, wait for it.

    Args:
        folder: Where to keep them.
        key: What the images depend on besides the model.
        model: Folder of the model, part of the key by the content of its files; or the name of a
            hub repository.
        draw: Draws the images, shape `(N, C, H, W)`.
    """
    digest = hashlib.sha256(key.encode())
    if not model.is_dir():
        digest.update(str(model).encode())
    for file in sorted(file for file in model.rglob("*") if file.is_file()):
        digest.update(file.read_bytes())
    path = folder / f"{digest.hexdigest()[:16]}.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    # The lock of a process that was killed is free again.
    with FileLock(path.with_suffix(".lock")):
        if path.exists():
            return load_file(path)["images"]
        images = draw()
        with atomic_file(path) as temporary:
            save_file({"images": images.contiguous()}, temporary)
    return images
