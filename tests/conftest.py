"""One thread per test process, and Hypothesis examples that are the same on every run."""

import os

import torch
from hypothesis import settings

# NNCF compiles its kernels on first use, while the other test process may be busy: seconds.
os.environ.setdefault("NNCF_EXTENSION_LOAD_TIMEOUT", "600")
torch.set_num_threads(1)
settings.register_profile("tdq", derandomize=True, deadline=None, max_examples=100)
settings.load_profile("tdq")
