"""Settings and fixtures for all tests."""

import os

# before torch and transformers are imported by any test
os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fills what `torch.empty` returns with NaN, so that reading memory before it is written cannot pass unseen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seeded():
    """Makes every test start from one state of the random generator, alone or in any order."""
    torch.manual_seed(0)
