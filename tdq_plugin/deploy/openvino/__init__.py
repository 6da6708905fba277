"""OpenVINO: frozen models on its int8 kernels, one model for all timesteps.

The one part of the package besides the adapters that imports a framework, and only for those who
import it.
"""

from tdq_plugin.errors import AdapterError
from tdq_plugin.extras import INSTALL

try:
    import openvino  # noqa: F401
except ModuleNotFoundError as error:
    raise AdapterError(f"OpenVINO is not installed. {INSTALL.format('openvino')}") from error

from tdq_plugin.deploy.openvino.convert import to_openvino
from tdq_plugin.deploy.openvino.denoiser import OVDenoiser
from tdq_plugin.deploy.openvino.model import OpenVINOModel
from tdq_plugin.deploy.openvino.package import load_openvino, save_openvino
from tdq_plugin.deploy.openvino.report import ConversionReport

__all__ = [
    "ConversionReport",
    "OVDenoiser",
    "OpenVINOModel",
    "load_openvino",
    "save_openvino",
    "to_openvino",
]
