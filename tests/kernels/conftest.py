"""What the tests of the Triton kernels share."""

import pytest


@pytest.fixture
def interpreted(monkeypatch):
    """Sends CPU tensors to the kernels."""
    monkeypatch.setenv("HF_KVCACHE_BACKEND", "triton")


@pytest.fixture
def no_reference(monkeypatch, request):
    """Fails a test in which a PyTorch version computes: one of the functions that its module names in `REFERENCES`."""

    def refuse(*arguments):
        raise AssertionError("the PyTorch version was called")

    for function in request.module.REFERENCES:
        monkeypatch.setattr(function, refuse)
