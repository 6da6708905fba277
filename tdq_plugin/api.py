"""The public names; `import tdq_plugin` gives them out."""

from tdq_plugin.attach import attach, named_quantizers, scale_bank, set_scale_bank
from tdq_plugin.calibrate import calibrate, calibration
from tdq_plugin.deploy import load_int8, lower_to_int8, save_int8
from tdq_plugin.errors import TDQError
from tdq_plugin.fit_correction import fit_output_correction
from tdq_plugin.freeze import freeze, load_scales
from tdq_plugin.graph import trace
from tdq_plugin.grid import QuantizationGrid, activation_grid, weight_grid
from tdq_plugin.output_correction import CorrectedDenoiser, OutputCorrection, load_correction
from tdq_plugin.pipeline_denoiser import PipelineDenoiser
from tdq_plugin.reconstruct import ReconstructionConfig, collect_trajectories, reconstruct
from tdq_plugin.scales import (
    ConstantBank,
    FrozenBank,
    GeneratorBank,
    GeneratorConfig,
    LearnedTableBank,
    ScaleBank,
)
from tdq_plugin.table import ScaleTable, load_table

__all__ = [
    "ConstantBank",
    "CorrectedDenoiser",
    "FrozenBank",
    "GeneratorBank",
    "GeneratorConfig",
    "LearnedTableBank",
    "OutputCorrection",
    "PipelineDenoiser",
    "QuantizationGrid",
    "ReconstructionConfig",
    "ScaleBank",
    "ScaleTable",
    "TDQError",
    "activation_grid",
    "attach",
    "calibrate",
    "calibration",
    "collect_trajectories",
    "fit_output_correction",
    "freeze",
    "load_correction",
    "load_int8",
    "load_scales",
    "load_table",
    "lower_to_int8",
    "named_quantizers",
    "reconstruct",
    "save_int8",
    "scale_bank",
    "set_scale_bank",
    "trace",
    "weight_grid",
]
