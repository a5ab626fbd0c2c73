"""Ten minutes on a CUDA machine: whether every kernel is right there, and how fast it is against what a copy takes.

    python examples/benchmarks/gpu.py              the whole run; writes results/gpu.csv
    python examples/benchmarks/gpu.py --rehearse   on a CPU, by the interpreter, at tiny sizes: does it run?

In order, so that a run that is cut short has answered the first questions first:

1. the machine: what a copy and a matrix product reach
2. correctness: every kernel against float64, the assembly against plain Triton, memory poisoned with NaN
3. decode attention of one layer (Llama-3.1-8B's shape): 4, 3 and 2 bits, dense bfloat16 of ours, SDPA, FlashAttention
4. ragged heads: the same entries, spread more and more unevenly
5. what a prompt costs: scoring, norms, selection, encoding, beside the attention of its layer; gated retention
6. a whole token of a model with random weights: transformers' DynamicCache, ours dense, in codes, ragged; as graphs;
   and, as a mean over 160 tokens, with the flushes in which a codec takes over what was decoded

Times of kernels are medians of CUDA graph replays over copies of the data that together do not fit in the second-level
cache. The share of copy is the bytes that must be moved (`roofline.py`), by the rate of the copy of step 1. Where there
is a goal for the H200, the row has it. `value` is an error in step 2, and a ratio of times in steps 4, 5 and 6. The
rows that are there are written when a later part fails.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

if "--rehearse" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["HF_KVCACHE_BACKEND"] = "triton"

import torch
from common import write_results
from gpu_bench import Bench
from gpu_checks import correctness
from gpu_timings import decode, machine, prompts, ragged, whole_steps


def rehearsal() -> Bench:
    """Sizes that an interpreter computes in seconds."""
    return Bench(torch.device("cpu"), True, heads=2, group=2, dim=64, shapes=[(1, 130)], contexts=[70])


def full() -> Bench:
    """One layer of Llama-3.1-8B."""
    shapes = [(1, 8192), (1, 32768), (1, 131072), (8, 8192), (32, 8192), (8, 32768)]
    return Bench(torch.device("cuda"), False, 8, 4, 128, shapes, contexts=[8192, 32768, 131072])


def model_of(bench: Bench) -> Any:
    """Llama-3.1-8B with random weights, or a tiny one."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256}
    if bench.rehearsal:
        sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 97}
    config = LlamaConfig(
        **sizes, num_attention_heads=bench.heads * bench.group, num_key_value_heads=bench.heads, head_dim=bench.dim,
        max_position_embeddings=1 << 18,
    )  # fmt: skip
    with torch.device(bench.device):
        return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true")
    arguments = parser.parse_args()
    if not torch.cuda.is_available() and not arguments.rehearse:
        print("this benchmark needs a CUDA device, and torch sees none; try --rehearse to see whether it would run")
        return 2
    bench = rehearsal() if arguments.rehearse else full()
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    try:
        with torch.no_grad():
            for part in (machine, correctness, decode, ragged, prompts):
                rows.extend(part(bench))
            rows.extend(whole_steps(bench, lambda: model_of(bench), bench.shapes[-1:] if arguments.rehearse
                                    else [(1, 32768), (1, 131072), (8, 32768)]))  # fmt: skip
    finally:
        if rows and not arguments.rehearse:
            properties = torch.cuda.get_device_properties(bench.device)
            about = {"device": properties.name, "multiprocessors": properties.multi_processor_count}
            write_results("gpu", [row | about for row in rows])
    if arguments.rehearse:
        print(f"{len(rows)} rows; nothing was measured and nothing is written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
