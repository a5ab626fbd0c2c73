"""The one `torch.library` namespace that all operators of this package register in, and who computes them.

An operator lives in `kernels/<op>.py`: its schema, a plain PyTorch implementation that works on every device, a fake
(shape-only) implementation for `torch.compile`, and, where it pays, a second implementation for one device type.
Callers always write `torch.ops.hf_kvcache.<op>(...)`; the dispatcher picks the implementation from the tensors' device.

`with_triton` hands CUDA tensors to `kernels/triton_ops/<op>.py`, where that can run them. HF_KVCACHE_BACKEND=reference
keeps to PyTorch; =triton insists on Triton, also for CPU tensors, which its interpreter then runs (TRITON_INTERPRET=1).
It is read at every call.
"""

import os
import warnings
from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

LIBRARY = torch.library.Library("hf_kvcache", "FRAGMENT")

BACKEND = "HF_KVCACHE_BACKEND"
BACKENDS = ("reference", "triton")
OLDEST_TRITON = (3, 6)
OLDEST_GPU = (8, 0)


def straight_to_cpu(tensor: Tensor) -> bool:
    """Whether a call may skip the dispatcher: on short blocks it costs more than the CPU kernel it chooses."""
    return (
        tensor.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and BACKEND not in os.environ
    )


def backend() -> str | None:
    """What HF_KVCACHE_BACKEND says, None when it is not set."""
    chosen = os.environ.get(BACKEND) or None
    if chosen is not None and chosen not in BACKENDS:
        raise ValueError(f"{BACKEND} must be one of {', '.join(BACKENDS)} or not set, got {chosen!r}")
    return chosen


def uses_triton(tensor: Tensor) -> bool:
    """Whether operators on this tensor go to Triton, where there is a kernel for their arguments.

    Raises:
        RuntimeError: HF_KVCACHE_BACKEND=triton asks for it and it cannot run.
    """
    chosen = backend()
    if chosen == "reference" or (chosen is None and tensor.device.type != "cuda"):
        return False
    missing = why_not(tensor.device)
    if missing is None:
        return True
    if chosen == "triton":
        raise RuntimeError(f"{BACKEND}=triton, but {missing}; unset {BACKEND} to let PyTorch compute it")
    _say_once(missing)
    return False


def has_kernel(file: str, *arguments: Any) -> bool:
    """Whether Triton computes on the first of these tensors, and has a kernel in this file of `triton_ops` for them."""
    if not uses_triton(arguments[0]):
        return False
    return import_module(f"hf_kvcache.kernels.triton_ops.{file}").takes(*arguments)


def at_once(device: torch.device, on_cpu: int, on_gpu: int) -> int:
    """How much an operator in PyTorch works on at a time: what a CPU's caches hold, and what keeps a GPU busy."""
    return on_cpu if device.type == "cpu" else on_gpu


@lru_cache(maxsize=64)
def why_not(device: torch.device) -> str | None:
    """Why Triton cannot run kernels on tensors of a device, None when it can."""
    if find_spec("hf_kvcache.kernels.triton_ops") is None:
        return "this installation has no hf_kvcache.kernels.triton_ops"
    if find_spec("triton") is None:
        return "Triton is not installed (pip install 'hf_kvcache[triton]')"
    launch = import_module("hf_kvcache.kernels.triton_ops.launch")
    if launch.VERSION < OLDEST_TRITON:
        return f"Triton {'.'.join(map(str, launch.VERSION))} is older than {'.'.join(map(str, OLDEST_TRITON))}"
    if launch.INTERPRETED:
        return None
    if device.type != "cuda":
        return f"Triton needs TRITON_INTERPRET=1 from the start of the process to compute on {device.type}"
    if torch.version.hip is not None:
        return "the kernels are for NVIDIA GPUs"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_GPU:
        return f"{torch.cuda.get_device_name(device)} is sm_{capability[0]}{capability[1]}, older than sm_80"
    return None


@lru_cache(maxsize=64)
def _say_once(missing: str) -> None:
    warnings.warn(
        f"hf_kvcache computes attention over caches in plain PyTorch: {missing}", RuntimeWarning, stacklevel=2
    )


def with_triton(op: str, reference: Callable[..., Any], *keys: str, file: str = "") -> None:
    """Registers an operator for CUDA and CPU: its Triton version where that can run, else `reference`.

    The Triton version returns `NotImplemented` for arguments that it has no kernel for.

    Args:
        op: its name, also of the function in `triton_ops`.
        reference: the PyTorch version.
        keys: dispatch keys to register for; CPU and CUDA when none is given.
        file: of that function, when it has another name.
    """

    def implementation(*arguments):
        if uses_triton(arguments[0]):
            launch = getattr(import_module(f"hf_kvcache.kernels.triton_ops.{file or op}"), op)
            # Triton launches on the current device, which need not be the one that the tensors are on
            with torch.cuda.device_of(arguments[0]):
                result = launch(*arguments)
            if result is not NotImplemented:
                return result
        return reference(*arguments)

    for key in keys or ("CPU", "CUDA"):
        LIBRARY.impl(op, implementation, key)


def refuse_gradient(op: str):
    """Returns a backward that raises: a cached continuation has no gradient, and a silent zero would be worse."""

    def backward(ctx, *grads):
        raise RuntimeError(
            f"hf_kvcache::{op} has no gradient: keys and values in the cache are constants. "
            "Train with a full forward pass instead (use_cache=False, or a single forward over the whole text)."
        )

    return backward
