"""Check a setting that takes one of a few words."""

from collections.abc import Iterable

from tdq_plugin.errors import ConfigError

__all__ = ["check_option"]


def check_option(name: str, value: object, options: Iterable[str]) -> None:
    """See that a value is one of the options.

    Raises:
        ConfigError: It is not.

    Example:
        >>> check_option("lookup", "exact", ("exact", "nearest"))
    """
    options = list(options)
    if value not in options:
        raise ConfigError(f"{name} = {value!r} is not one of {', '.join(options)}.")
