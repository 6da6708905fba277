"""The log of a training: JSON lines always, and the trackers that the user asks for."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from accelerate import Accelerator

from tdq_plugin.errors import ConfigError
from tdq_plugin.files import atomic_file
from tdq_plugin.recipes.processes import start_processes

__all__ = ["Tracker", "TrainingLog", "make_accelerator", "require_trackers"]

Tracker = Literal["tensorboard", "trackio", "wandb"]


def require_trackers(trackers: list[Tracker]) -> None:
    """Check before anything else that the trackers can be used.

    Raises:
        ConfigError: A tracker's package is missing.
    """
    for tracker in trackers:
        if find_spec(tracker) is None:
            raise ConfigError(
                f"trackers = {trackers}: {tracker} is not installed. "
                f"Install it: pip install {tracker}."
            )


def make_accelerator(
    folder: Path, mixed_precision: str, trackers: list[Tracker], config: dict[str, Any]
) -> Accelerator:
    """Accelerate on whatever devices and processes the recipe was launched on.

    Args:
        folder: Of the run; TensorBoard's files go there.
        mixed_precision: `no` or `bf16`.
        trackers: Accelerate's trackers.
        config: What the trackers show as the run's configuration.

    Raises:
        ConfigError: A tracker's package is missing.
    """
    require_trackers(trackers)
    accelerator = start_processes(
        mixed_precision=mixed_precision,
        log_with=list(trackers) or None,
        project_dir=folder,
    )
    if trackers:
        accelerator.init_trackers("tdq", config={"config": json.dumps(config)})
    return accelerator


class TrainingLog:
    """Records of a training, one JSON object a line.

    Args:
        path: The file; a restart goes on with it.
        accelerator: The main process alone writes.
        start: Step from which training goes on; later records of an interrupted run are dropped.
    """

    def __init__(self, path: Path, accelerator: Accelerator, start: int) -> None:
        self.path, self.accelerator = path, accelerator
        if accelerator.is_main_process:
            kept = [line for line in _lines(path) if json.loads(line)["step"] <= start]
            with atomic_file(path) as temporary:
                temporary.write_text("".join(kept))

    def write(self, step: int, **values: float) -> None:
        """Add a record, here and to the trackers."""
        self.accelerator.log(values, step=step)
        if self.accelerator.is_main_process:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")


def _lines(path: Path) -> list[str]:
    """Complete lines; a kill can leave half of one at the end."""
    if not path.exists():
        return []
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
