"""The one `torch.library` namespace that all operators of this package register in.

An operator lives in `kernels/<op>.py`: its schema, a plain PyTorch implementation that works on every device, a fake
(shape-only) implementation for `torch.compile`, and, where it pays, a second implementation for one device type.
Callers always write `torch.ops.hf_kvcache.<op>(...)`; the dispatcher picks the implementation from the tensors' device.
"""

import torch
from torch import Tensor

LIBRARY = torch.library.Library("hf_kvcache", "FRAGMENT")


def straight_to_cpu(tensor: Tensor) -> bool:
    """Whether a call may skip the dispatcher: on short blocks it costs more than the CPU kernel it chooses."""
    return tensor.device.type == "cpu" and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def refuse_gradient(op: str):
    """Returns a backward that raises: a cached continuation has no gradient, and a silent zero would be worse."""

    def backward(ctx, *grads):
        raise RuntimeError(
            f"hf_kvcache::{op} has no gradient: keys and values in the cache are constants. "
            "Train with a full forward pass instead (use_cache=False, or a single forward over the whole text)."
        )

    return backward
