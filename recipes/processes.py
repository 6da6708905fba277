"""Accelerate's devices and processes, as the recipes start them."""

from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs

__all__ = ["start_processes"]

# While one process downloads, trains or measures, the others wait for it.
PATIENCE = timedelta(days=7)


def start_processes(**options: Any) -> Accelerator:
    """Accelerate on whatever devices and processes the recipe was launched on.

    Args:
        **options: Further ones of `accelerate.Accelerator`.
    """
    patience = InitProcessGroupKwargs(timeout=PATIENCE)
    cpu = not torch.cuda.is_available()
    return Accelerator(cpu=cpu, kwargs_handlers=[patience], **options)
