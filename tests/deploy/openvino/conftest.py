"""One converted model for the tests of what can be done with it."""

import pytest
from contract.networks import example_inputs
from deploy.networks import frozen_tiny

from tdq_plugin.deploy.openvino import to_openvino


@pytest.fixture(scope="session")
def tiny():
    """The frozen tiny denoiser and its conversion."""
    frozen = frozen_tiny()
    return frozen, to_openvino(frozen, example_inputs())
