"""Eviction on SmolLM2-135M against transformers' default cache: bytes, cost in prefill, decode, peak memory.

float32 on the CPU; speeds are ratios to the default cache, timed in turn (`interleaved.py`). Bytes are live storages
right after the prefill, indices included. `prefill_overhead` is what scoring, selecting and compacting take of a
prefill: the time in those parts over the time in all others, within the same prefill; the second passes of `kvzip` are
in `prefill_speedup` only. `peak_mb` is the most memory that a prefill takes above the level before it, in a fresh
process each.

    python examples/benchmarks/eviction_speed.py [--context 4096] [--budget 0.25] [--repetitions 5] [--steps 16]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from statistics import median

import torch
from common import write_results
from interleaved import DEFAULT, compare, twin

from hf_kvcache import HeadImportance, patch_model, smollm2
from hf_kvcache.layers import KVCacheLayer

METHODS = {
    "none": {},
    "snapkv": {},
    "adakv": {},
    "headkv": {},
    "criticalkv l2": {"norm": "l2"},
    "adakv+criticalkv l1": {"norm": "l1"},
    "kvzip": {},
}


def patch(model, tokenizer, name: str, budget: float) -> None:
    method, options = name.split()[0], dict(METHODS[name])
    if method == "none":
        patch_model(model)
        return
    if method == "headkv":
        # which heads matter does not matter here
        shape = model.config.num_hidden_layers, model.config.num_attention_heads
        options["importance"] = HeadImportance(torch.rand(shape, generator=torch.Generator().manual_seed(0)))
    patch_model(model, method, tokenizer=tokenizer, budget=budget, **options)


def context(tokenizer, length: int) -> torch.Tensor:
    text = (files("hf_kvcache") / "data" / "demo.txt").read_text(encoding="utf-8")
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    return ids.repeat(1, -(-length // ids.shape[1]))[:, :length]


class OwnWork:
    """Measures, while it is entered, how long cache layers record, score, select and compact."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._originals = {name: getattr(KVCacheLayer, name) for name in ("_record", "_finish_forward")}

    def __enter__(self) -> OwnWork:
        for name, original in self._originals.items():
            setattr(KVCacheLayer, name, self._measured(original))
        return self

    def __exit__(self, *error: object) -> None:
        for name, original in self._originals.items():
            setattr(KVCacheLayer, name, original)

    def _measured(self, original: Callable[..., None]) -> Callable[..., None]:
        def measured(*args: object) -> None:
            start = time.perf_counter()
            original(*args)
            self.seconds += time.perf_counter() - start

        return measured


def peak_memory(name: str, length: int, budget: float) -> float:
    """Peak resident MB of a prefill above the level before it, in a fresh process."""
    command = [sys.executable, __file__, "--peak-of", name, "--context", str(length), "--budget", str(budget)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def measure_peak(name: str, length: int, budget: float) -> None:
    model, tokenizer = smollm2.load()
    ids = context(tokenizer, length)
    if name != "default":
        patch(model, tokenizer, name, budget)
    with torch.no_grad():
        model(input_ids=ids[:, :256], use_cache=True, logits_to_keep=1)
        before = resident_mb("VmRSS")
        # sets the mark of the highest level back to the present one
        Path("/proc/self/clear_refs").write_text("5")
        model(input_ids=ids, use_cache=True, logits_to_keep=1)
    print(json.dumps(resident_mb("VmHWM") - before))


def resident_mb(what: str) -> float:
    """A figure of /proc/self/status, in MB: VmRSS, what is resident, or VmHWM, the most that was."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--budget", type=float, default=0.25)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--methods", nargs="+", choices=METHODS)
    parser.add_argument("--no-peak", action="store_true", help="leave out peak memory, which takes a process a method")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak_of:
        measure_peak(options.peak_of, options.context, options.budget)
        return
    model, tokenizer = smollm2.load()
    ids = context(tokenizer, options.context)
    names = options.methods or list(METHODS)
    copies = {DEFAULT: model} | {name: twin(model) for name in names}
    for name in names:
        patch(copies[name], tokenizer, name, options.budget)
    with OwnWork() as own:
        timings = compare(copies, ids, options.repetitions, options.steps, lambda: own.seconds)
    full_bytes = timings[DEFAULT].kv_bytes
    peaks = {} if options.no_peak else {name: peak_memory(name, options.context, options.budget) for name in names}
    default_peak = 0.0 if options.no_peak else peak_memory("default", options.context, options.budget)
    rows = []
    for name in names:
        row = {
            "method": name,
            "context": options.context,
            "budget": 1.0 if name == "none" else options.budget,
            "kv_bytes_of_default": timings[name].kv_bytes / full_bytes,
            "prefill_overhead": median(timings[name].own),
        } | timings[name].row()
        if peaks:
            row |= {"peak_mb": peaks[name], "default_peak_mb": default_peak, "default_cache_mb": full_bytes / 2**20}
        rows.append(row)
    write_results(f"eviction_speed_{options.context}", rows)


if __name__ == "__main__":
    main()
