"""The scale table: what `freeze` makes and what is saved. One safetensors file with metadata."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tdq_plugin.errors import ScaleError, TableFormatError, TableMismatchError
from tdq_plugin.files import atomic_file
from tdq_plugin.grid import QuantizationGrid

__all__ = ["FORMAT_VERSION", "ScaleTable", "check_names", "load_table"]

FORMAT_VERSION = 1
_TENSORS = ("timesteps", "scales", "zero_points")


@dataclass(frozen=True, eq=False)
class ScaleTable:
    """Scales and zero points of L quantizers at T timesteps.

    Attributes:
        grids: The grid of each quantizer by its name; the order is the column order.
        timesteps: Float32, ascending, shape `(T,)`.
        scales: Float32, positive, shape `(T, L)`.
        zero_points: Float32, integer valued, shape `(1, L)` if constant over t, else `(T, L)`.

    Raises:
        ScaleError: Shapes do not fit together, a scale is not positive and finite, a zero point
            is not a code of its grid, or the timesteps do not ascend.
    """

    grids: Mapping[str, QuantizationGrid]
    timesteps: Tensor
    scales: Tensor
    zero_points: Tensor

    def __post_init__(self) -> None:
        for name in _TENSORS:
            dtype = getattr(self, name).dtype
            if dtype != torch.float32:
                raise ScaleError(f"The {name} are {dtype}; a table is float32. Convert them.")
        steps, rows = self.timesteps.numel(), len(self.grids)
        if self.scales.shape != (steps, rows):
            raise ScaleError(
                f"The scales have shape {tuple(self.scales.shape)}, but there are {steps} "
                f"timesteps and {rows} quantizers."
            )
        if self.zero_points.shape not in {(1, rows), (steps, rows)}:
            raise ScaleError(
                f"The zero points have shape {tuple(self.zero_points.shape)}; "
                f"expected (1, {rows}) or ({steps}, {rows})."
            )
        if steps == 0 or self.timesteps.dim() != 1 or not bool((self.timesteps.diff() > 0).all()):
            raise ScaleError(f"The timesteps {self.timesteps.tolist()[:5]}... do not ascend.")
        self._check_values()

    def _check_values(self) -> None:
        for column, (name, grid) in enumerate(self.grids.items()):
            scales, zeros = self.scales[:, column], self.zero_points[:, column]
            if not bool((scales.isfinite() & (scales > 0)).all()):
                wrong = scales[~(scales.isfinite() & (scales > 0))][0].item()
                raise ScaleError(f"A scale of {name!r} is {wrong}; it must be positive and finite.")
            inside = (
                (zeros >= grid.quant_min) & (zeros <= grid.quant_max) & (zeros == zeros.round())
            )
            if not bool(inside.all()):
                raise ScaleError(
                    f"A zero point of {name!r} is {zeros[~inside][0].item()}; it must be one of "
                    f"the codes {grid.quant_min} .. {grid.quant_max}."
                )

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the quantizers, in column order."""
        return tuple(self.grids)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, atomically; names, grids and version are its metadata."""
        grids = {
            name: [grid.quant_min, grid.quant_max, grid.symmetric]
            for name, grid in self.grids.items()
        }
        metadata = {"format": "tdq-scale-table", "version": str(FORMAT_VERSION)}
        tensors = {
            "timesteps": self.timesteps.contiguous(),
            "scales": self.scales.contiguous(),
            "zero_points": self.zero_points.contiguous(),
        }
        with atomic_file(path) as temporary:
            save_file(tensors, temporary, metadata | {"grids": json.dumps(grids)})


def load_table(path: str | Path) -> ScaleTable:
    """Read a table that `ScaleTable.save` wrote.

    Raises:
        TableFormatError: The file is truncated, no scale table, or of an unknown version.
        ScaleError: The values are not those of a table.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise TableFormatError(f"{path} is not a readable safetensors file: {error}.") from error
    _check_format(path, metadata)
    try:
        return ScaleTable(_grids(metadata["grids"]), **{key: tensors[key] for key in _TENSORS})
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, ScaleError):
            raise
        raise TableFormatError(f"{path} is not a complete scale table: {error!r}.") from error


def _check_format(path: str | Path, metadata: dict[str, str]) -> None:
    if metadata.get("format") != "tdq-scale-table":
        raise TableFormatError(
            f"{path} is a safetensors file, but no scale table (its metadata is {metadata}). "
            "Give the file that ScaleTable.save wrote."
        )
    if metadata.get("version") != str(FORMAT_VERSION):
        raise TableFormatError(
            f"{path} has format version {metadata.get('version')!r}; this release reads "
            f"version {FORMAT_VERSION}. Update tdq-plugin."
        )


def _grids(text: str) -> dict[str, QuantizationGrid]:
    entries: dict[str, Any] = json.loads(text)
    return {name: QuantizationGrid(*entry) for name, entry in entries.items()}


def check_names(expected: Sequence[str], given: Sequence[str]) -> None:
    """Raise `TableMismatchError` unless both hold the same names, in any order."""
    missing = [name for name in expected if name not in set(given)]
    unknown = [name for name in given if name not in set(expected)]
    if missing or unknown:
        raise TableMismatchError(
            f"The scales belong to other layers: {len(missing)} of the model's "
            f"{len(expected)} quantizers are missing (first: {missing[:3]}), "
            f"{len(unknown)} are unknown (first: {unknown[:3]}). "
            "Use the table that was made from this model."
        )


def timesteps_tensor(values: list[float]) -> Tensor:
    """Ascending float32 timesteps without duplicates, shape `(T,)`."""
    # Duplicates are sought in float32: what differs in float64 may not differ in the table.
    steps: Tensor = torch.tensor(values, dtype=torch.float32).unique()
    return steps
