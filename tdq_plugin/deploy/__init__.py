"""Integer execution of frozen models."""

from tdq_plugin.deploy.lower import lower_to_int8
from tdq_plugin.deploy.package import load_int8, save_int8

__all__ = ["load_int8", "lower_to_int8", "save_int8"]
