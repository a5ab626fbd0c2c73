"""Prefill of YOCO against a Transformer of the same size, by length: seconds and peak memory. Random weights, float32.

Both make the logits of the last position and a filled cache. Times are taken in turn within one process, with one
thread (`OMP_NUM_THREADS=1`) the processor's; the peak is the high-water mark of a process of its own, above what it
held before the prefill. The Transformer reads the prompt at once, as it does by itself; so does `yoco-half`. The
original YOCO reads it in parts (`self_decoder_chunk_size`).

    python examples/benchmarks/yoco_prefill.py [--lengths 2048 4096 8192 16384] [--repetitions 2]

Rows are added to the table, or replace those of the same model and length.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from statistics import median

import torch
from common import add_results
from interleaved import now

from hf_kvcache import patch_model, report

sys.path.append(str(Path(__file__).parents[1]))
from yoco_models import build, count

SIZES = {
    "vocab_size": 1024,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 65536,
}
WINDOW = 1024
ARMS = ("transformer", "yoco-half", "yoco-window", "yoco-retention")
# of the Transformer, which the others match by the width of their MLP
PARAMETERS = 23_601_664


def model_of(arm: str):
    """A model with our cache."""
    model = build(arm, SIZES, WINDOW, seed=0, parameters=PARAMETERS).eval()
    return patch_model(model, None)


def ids_of(length: int) -> torch.Tensor:
    return torch.randint(SIZES["vocab_size"], (1, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def prefill(model, ids: torch.Tensor) -> tuple[float, int]:
    """One prefill: its time and the bytes of its cache."""
    start = now()
    cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values
    return now() - start, report(cache).bytes


def memory(name: str) -> int:
    """Bytes that this process holds (VmRSS) or has held at most (VmHWM)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def peak(arm: str, length: int) -> float:
    """Peak bytes of a prefill, measured in a new process."""
    command = [sys.executable, __file__, "--child", arm, str(length)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def child(arm: str, length: int) -> None:
    model = model_of(arm)
    prefill(model, ids_of(64))
    before = memory("VmRSS")
    prefill(model, ids_of(length))
    print(memory("VmHWM") - before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192, 16384])
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument("--models", nargs="+", choices=ARMS[1:], default=ARMS[1:], help="beside the Transformer")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child[0], int(options.child[1]))
        return
    models = {arm: model_of(arm) for arm in (ARMS[0], *options.models)}
    for length in options.lengths:
        ids = ids_of(length)
        times: dict[str, list[float]] = {arm: [] for arm in models}
        held: dict[str, int] = {}
        for _ in range(options.repetitions):
            for arm, model in models.items():
                taken, held[arm] = prefill(model, ids)
                times[arm].append(taken)
        peaks = {arm: peak(arm, length) for arm in models}
        for arm, model in models.items():
            ratios = [full / own for full, own in zip(times["transformer"], times[arm], strict=True)]
            add_results(
                "yoco_prefill",
                {
                    "model": arm,
                    "parameters": count(model),
                    "length": length,
                    "repetitions": options.repetitions,
                    "seconds": median(times[arm]),
                    "speedup": median(ratios),
                    "speedup_low": min(ratios),
                    "speedup_high": max(ratios),
                    "peak_mb": peaks[arm] / 1e6,
                    "peak_ratio": peaks["transformer"] / peaks[arm],
                    "kv_bytes": held[arm],
                },
                key=("model", "length"),
            )


if __name__ == "__main__":
    main()
