"""One thread per test process, and Hypothesis examples that are the same on every run."""

import gc
import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# OpenVINO and NNCF report what they do over the network: seconds for every converted model.
os.environ["CI"] = "true"
os.environ["NNCF_CI"] = "1"
# NNCF compiles its kernels on first use, while the other test process may be busy: seconds.
os.environ.setdefault("NNCF_EXTENSION_LOAD_TIMEOUT", "300")
# In the user's cache, the lock of a build that was killed would stop every run of the tests.
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))
torch.set_num_threads(1)
settings.register_profile("tdq", derandomize=True, deadline=None, max_examples=100)
settings.load_profile("tdq")


def pytest_collection_finish() -> None:
    """All frameworks are imported by now, and looking for garbage in them takes a second."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Every test draws the same numbers, whichever ran before it."""
    torch.manual_seed(0)
