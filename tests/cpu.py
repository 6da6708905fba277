"""What tests ask of the CPU."""

import pytest

from tdq_plugin.deploy.halves import has_32_bit_sums

needs_vnni = pytest.mark.skipif(
    not has_32_bit_sums(),
    reason="without VNNI, int8 kernels of onnxruntime, OpenVINO and Inductor cut off sums",
)
