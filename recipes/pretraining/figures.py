"""The pictures of a pretraining run."""

from pathlib import Path

from tdq_plugin.files import atomic_file
from tdq_plugin.study.figures import loss_curve

__all__ = ["write_figures"]


def write_figures(folder: Path, losses: list[float], **pictures: bytes) -> None:
    """Write `loss.png`, and PNG pictures by name."""
    for name, png in {"loss": loss_curve(losses), **pictures}.items():
        with atomic_file(folder / f"{name}.png") as temporary:
            temporary.write_bytes(png)
