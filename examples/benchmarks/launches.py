"""How many launches a layer costs in a decoding step of a fixed shape, ours and transformers', without a GPU.

    python examples/benchmarks/launches.py       writes results/launches.csv

In a CUDA graph every launch takes some two microseconds, however little it does; 32 layers of ten launches are more
than half a millisecond a token. Counted are PyTorch's operators, but for those that only change how memory is looked
at, and the Triton kernels of ours, which the interpreter runs here. A layer is what a model of three layers has more
than one of two. PyTorch's own attention counts as one operator; on a GPU it may be two kernels.
"""

from __future__ import annotations

import os

# the interpreter takes the place of the compiler when the kernels are imported
os.environ |= {"TRITON_INTERPRET": "1", "HF_KVCACHE_BACKEND": "triton"}

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from common import write_results
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import StaticCache

from hf_kvcache import compile_decode, patch_model
from hf_kvcache.patches import compiled
from hf_kvcache.testing import random_ids, tiny_model

CONTEXT = 200
SETTINGS: tuple[tuple[str | None, dict[str, Any]], ...] = (
    (None, {}),
    ("turboquant", {"bits": 4}),
    ("snapkv", {"budget": 0.5}),
    ("adakv", {"budget": 0.5}),
    ("adakv+turboquant", {"budget": 0.5}),
)
# what launches nothing
VIEWS = {"_unsafe_view", "alias", "as_strided", "detach", "expand", "permute", "select", "slice", "split"}
VIEWS |= {"split_with_sizes", "squeeze", "t", "transpose", "unbind", "unsqueeze", "view"}


class Operators(TorchDispatchMode):
    """Counts what PyTorch launches itself."""

    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, name = func.name().split("::")
        if namespace == "aten" and name.split(".")[0] not in VIEWS:
            self.found[name.split(".")[0]] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def counted(found: Counter[str]):
    """Counts operators and kernels."""
    from triton.runtime.interpreter import GridExecutor

    run = GridExecutor.__call__

    def launch(executor, *args, **kwargs):
        found[f"kernel {executor.fn.__name__}"] += 1
        # the interpreter copies what a kernel is given
        with torch.utils._python_dispatch._disable_current_modes():
            return run(executor, *args, **kwargs)

    with mock.patch.object(GridExecutor, "__call__", launch), Operators(found):
        yield


def model_of(layers: int) -> Any:
    return tiny_model("llama", num_hidden_layers=layers, head_dim=16).to(torch.bfloat16)


@torch.no_grad()
def of_transformers(layers: int) -> Counter[str]:
    """A step over transformers' static cache."""
    model, found = model_of(layers), Counter()
    cache = StaticCache(config=model.config, max_cache_len=CONTEXT + 8)
    model(random_ids(length=CONTEXT), past_key_values=cache)
    with counted(found):
        model(random_ids(length=1), past_key_values=cache)
    return found


def of_ours(method: str | None, options: dict[str, Any], layers: int) -> Counter[str]:
    """A step as `compile_decode` records it."""
    found: Counter[str] = Counter()

    def capture(run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        found.clear()
        with counted(found):
            output = run()
        return lambda: None, output

    model = compile_decode(patch_model(model_of(layers), method, **options))
    with mock.patch.object(compiled, "capture_for", lambda device: capture):
        model.generate(random_ids(length=CONTEXT), max_new_tokens=10, min_new_tokens=10, do_sample=False)
    return found


def row(label: str, count: Callable[[int], Counter[str]]) -> dict[str, Any]:
    """A line of the table."""
    layer = count(3) - count(2)
    kernels = {name: number for name, number in layer.items() if name.startswith("kernel ")}
    ours = sum(kernels.values())
    return {
        "setting": label,
        "launches a layer": layer.total(),
        "operators of PyTorch": layer.total() - ours,
        "kernels of ours": ours,
        "which": ", ".join(f"{number} {name.removeprefix('kernel ')}" for name, number in sorted(kernels.items())),
    }


def rows(settings: Sequence[tuple[str | None, dict[str, Any]]] = SETTINGS) -> list[dict[str, Any]]:
    ours = [
        row(" ".join([method or "none", *(f"{name}={value}" for name, value in options.items())]),
            lambda layers, method=method, options=options: of_ours(method, options, layers))
        for method, options in settings
    ]  # fmt: skip
    return [row("transformers, static cache", of_transformers), *ours]


def main() -> int:
    write_results("launches", rows())
    return 0


if __name__ == "__main__":
    sys.exit(main())
