"""What every test shares: one thread, a fixed seed, reproducible property tests."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("mm", deadline=None, derandomize=True, max_examples=30, print_blob=False)
settings.load_profile("mm")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
