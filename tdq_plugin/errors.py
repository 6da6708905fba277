"""The exceptions this package raises, all below `TDQError`."""

__all__ = [
    "AdapterError",
    "CalibrationError",
    "ConfigError",
    "LookupRuleError",
    "ScaleError",
    "StorageError",
    "TDQError",
    "TableFormatError",
    "TableMismatchError",
    "TimestepError",
    "TraceError",
]


class TDQError(Exception):
    """Base of every error that tdq-plugin raises on purpose."""


class TimestepError(TDQError, ValueError):
    """A timestep is missing, malformed, or outside the range that was asked for."""


class LookupRuleError(TimestepError):
    """A timestep is not in the table and the table's lookup rule does not cover it."""


class ScaleError(TDQError, ValueError):
    """A scale or zero point is not finite, not positive, or of the wrong shape."""


class CalibrationError(TDQError, ValueError):
    """Calibration saw no data, or data that no range can be computed from."""


class TableFormatError(TDQError, ValueError):
    """A file is not a scale table, is truncated, or is of an unknown version."""


class TableMismatchError(TDQError, ValueError):
    """A scale table belongs to other layers than the model's."""


class StorageError(TDQError, OSError):
    """A file could not be written, for example on a full disk."""


class AdapterError(TDQError, RuntimeError):
    """A framework is missing, a model is in the wrong state, or no adapter covers it."""


class TraceError(TDQError, RuntimeError):
    """A model could not be turned into a graph."""


class ConfigError(TDQError, ValueError):
    """A recipe, an override or a configuration value is not valid."""
