"""One thread per test process, and Hypothesis examples that are the same on every run."""

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("tdq", derandomize=True, deadline=None, max_examples=100)
settings.load_profile("tdq")
