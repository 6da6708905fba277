"""The checkpoints of lowest validation loss."""

import json
from pathlib import Path

from torch import nn

from tdq_plugin.files import atomic_file
from tdq_plugin.recipes.qat.model import save_weights

__all__ = ["BestCheckpoints"]


class BestCheckpoints:
    """Keeps the weights with the lowest losses in a folder.

    A restart that repeats a step writes the same again, so it changes nothing.

    Args:
        folder: Holds `best.json`, losses by step, and one safetensors file for each step.
        keep: How many to keep.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep
        self._index = folder / "best.json"

    def losses(self) -> dict[int, float]:
        """Validation loss of the kept steps, lowest first."""
        if not self._index.exists():
            return {}
        losses = {int(step): loss for step, loss in json.loads(self._index.read_text()).items()}
        return dict(sorted(losses.items(), key=lambda entry: entry[1]))

    def path(self, step: int) -> Path:
        """Where the weights of a step are."""
        return self.folder / f"step-{step:07d}.safetensors"

    def add(self, model: nn.Module, step: int, loss: float) -> None:
        """Keep the model's weights if they are among the best."""
        losses = self.losses() | {step: loss}
        kept = dict(sorted(losses.items(), key=lambda entry: entry[1])[: self.keep])
        if step in kept:
            save_weights(model, self.path(step))
        with atomic_file(self._index) as temporary:
            temporary.write_text(json.dumps(kept, indent=2))
        for dropped in losses.keys() - kept.keys():
            self.path(dropped).unlink(missing_ok=True)
