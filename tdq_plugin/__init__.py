"""Timestep-dependent activation scales for diffusion models (TDQ, arXiv 2306.02316)."""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tdq_plugin.api import *  # noqa: F403

__version__ = "0.1.0"


class _Package(ModuleType):
    """Looks the public names up in `tdq_plugin.api` when one is asked for.

    So the command line can print its help without waiting for torch.
    """

    _verbs = frozenset({"attach", "calibrate", "freeze", "reconstruct"})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") and name != "__all__":
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return getattr(import_module("tdq_plugin.api"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        # Python sets each imported submodule as an attribute; it must not hide the verb it holds.
        if not (name in self._verbs and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
