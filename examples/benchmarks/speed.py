"""Bytes, prefill and decode of SmolLM2-135M against transformers' default cache, float32 on the CPU.

Speeds are ratios to the default cache, timed in turn (`interleaved.py`). KVSharer's map does not matter for speed, so a
fixed one is used: nothing is searched.

    python examples/benchmarks/speed.py [--context 4096] [--repetitions 5] [--steps 16]
"""

from __future__ import annotations

import argparse
from importlib.resources import files

import torch
from common import write_results
from interleaved import DEFAULT, compare, twin

from hf_kvcache import KVSharer, SharingPlan, patch_model, smollm2, unpatch_model
from hf_kvcache.measure import speed


def variants(num_layers: int) -> dict[str, KVSharer | None]:
    """The patched variants by name."""
    result: dict[str, KVSharer | None] = {"none": None}
    for count in (4, 8):
        pairs = [(num_layers - 1 - 2 * index, num_layers - 2 - 2 * index) for index in range(count)]
        result[f"kvsharer {count} of {num_layers}"] = KVSharer(plan=SharingPlan.from_pairs(num_layers, pairs))
    return result


def projections_called(model, ids: torch.Tensor, plan: SharingPlan) -> int:
    """How often the consumers' original key and value projections run in a prefill and a decode step."""
    calls = []
    unpatch_model(model)
    originals = [
        getattr(model.model.layers[layer].self_attn, name) for layer in plan.consumers for name in ("k_proj", "v_proj")
    ]
    handles = [module.register_forward_hook(lambda *_: calls.append(1)) for module in originals]
    patch_model(model, KVSharer(plan=plan))
    speed(model, ids, steps=2)
    unpatch_model(model)
    for handle in handles:
        handle.remove()
    return len(calls)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--steps", type=int, default=16)
    options = parser.parse_args()
    model, tokenizer = smollm2.load()
    text = (files("hf_kvcache") / "data" / "demo.txt").read_text(encoding="utf-8")
    ids = tokenizer(text, return_tensors="pt")["input_ids"][:, : options.context]
    num_layers = model.config.num_hidden_layers
    copies = {DEFAULT: model} | {name: twin(model) for name in variants(num_layers)}
    for name, method in variants(num_layers).items():
        patch_model(copies[name], method)
    timings = compare(copies, ids, options.repetitions, options.steps)
    full_bytes = timings[DEFAULT].kv_bytes
    rows = []
    for name, method in variants(num_layers).items():
        plan = method.plan if method else SharingPlan.identity(num_layers)
        rows.append(
            {
                "method": name,
                "context": ids.shape[1],
                "kv_bytes": timings[name].kv_bytes,
                "kv_bytes_of_default": timings[name].kv_bytes / full_bytes,
                "promised_share": 1 - len(plan.consumers) / num_layers,
                "consumer_projection_calls": projections_called(model, ids[:, :64], plan),
            }
            | timings[name].row()
        )
    write_results(f"speed_{ids.shape[1]}", rows)


if __name__ == "__main__":
    main()
