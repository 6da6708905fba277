"""Post-training quantization: calibration data and block-wise reconstruction."""

from tdq_plugin.reconstruct.blocks import Block, Granularity, find_blocks
from tdq_plugin.reconstruct.collect import (
    CalibrationSet,
    TimestepDistribution,
    collect_trajectories,
)
from tdq_plugin.reconstruct.config import ReconstructionConfig
from tdq_plugin.reconstruct.reconstruct import Progress, reconstruct

__all__ = [
    "Block",
    "CalibrationSet",
    "Granularity",
    "Progress",
    "ReconstructionConfig",
    "TimestepDistribution",
    "collect_trajectories",
    "find_blocks",
    "reconstruct",
]
