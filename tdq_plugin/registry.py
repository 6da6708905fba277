"""Adapters: who knows how to attach a scale bank to a prepared model of which framework."""

from importlib.metadata import entry_points
from typing import Protocol, TypeVar

from torch import nn

from tdq_plugin.errors import AdapterError
from tdq_plugin.quantizer import ActivationQuantizer

__all__ = [
    "ENTRY_POINT_GROUP",
    "Adapter",
    "adapter_for",
    "register_adapter",
    "unavailable_adapters",
]

ENTRY_POINT_GROUP = "tdq_plugin.adapters"


class Adapter(Protocol):
    """What a framework's adapter provides. Decorate it with `register_adapter("name")`."""

    @staticmethod
    def covers(model: nn.Module) -> bool:
        """Whether this adapter's framework prepared the model."""

    @staticmethod
    def quantizers(model: nn.Module) -> dict[str, ActivationQuantizer]:
        """Strip quantizers that TDQ does not want, and name the rest in order of execution."""

    @staticmethod
    def connect(model: nn.Module, timestep_argument: str | None) -> None:
        """Lead the rows of `model.scale_bank` to the quantizers."""


AdapterClass = TypeVar("AdapterClass", bound=type[Adapter])
_ADAPTERS: dict[str, type[Adapter]] = {}


def register_adapter(name: str):  # type: ignore[no-untyped-def]
    """Class decorator that registers an adapter under a name.

    A package outside this one lists its module in the entry-point group `tdq_plugin.adapters`;
    importing the module registers the adapter.

    Raises:
        AdapterError: Another adapter has the name.
    """

    def register(adapter: AdapterClass) -> AdapterClass:
        known = _ADAPTERS.get(name)
        if known is not None and known.__qualname__ != adapter.__qualname__:
            raise AdapterError(f"The adapter name {name!r} is taken by {known.__qualname__}.")
        _ADAPTERS[name] = adapter
        return adapter

    return register


def adapter_for(model: nn.Module) -> type[Adapter]:
    """The adapter that covers a model.

    Raises:
        AdapterError: None does; the message lists the adapters and why some could not load.
    """
    # Whoever prepared the model has imported its adapter: the other frameworks need not load.
    found = _covering(model)
    if found is not None:
        return found
    missing = unavailable_adapters()
    found = _covering(model)
    if found is not None:
        return found
    known = ", ".join(sorted(_ADAPTERS)) or "none"
    unavailable = "".join(f" {name} is not available: {why}." for name, why in missing.items())
    raise AdapterError(
        f"No adapter covers this {type(model).__name__}: it has no TDQ activation quantizers. "
        f"Prepare the model with the framework first. Adapters loaded: {known}.{unavailable}"
    )


def unavailable_adapters() -> dict[str, str]:
    """Import every adapter that is installed; the names of those that fail, and why."""
    missing = {}
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        if entry.name in _ADAPTERS:
            continue
        try:
            entry.load()
        except ImportError as error:
            missing[entry.name] = str(error)
    return missing


def _covering(model: nn.Module) -> type[Adapter] | None:
    return next((adapter for adapter in _ADAPTERS.values() if adapter.covers(model)), None)
