"""Measured plans at 4, 8 and 16 times fewer bytes than in 16 bits, beside single methods and plans without measuring.

Plans are tuned on the shipped sample and judged by the protocol of `peers.py` on other texts. Eviction alone keeps
what it keeps in the dtype of the model: its bytes are those of a 16-bit model. The rows of kvpress and transformers
come from `peers.py --name plans` with the same documents.

    python examples/benchmarks/plans.py tune
    python examples/benchmarks/plans.py compare
    PYTHONPATH=. peers/bin/python examples/benchmarks/peers.py --name plans --backend kvpress --methods kvzip snapkv \\
        --kept 0.25 0.125 0.0625 --documents topics play
"""

from __future__ import annotations

import argparse
import json
import time
from types import SimpleNamespace
from typing import Any

from common import RESULTS, add_results, real_models
from peer_protocol import document, texts
from peers import run

from hf_kvcache.planning import Tuner, solve, verify
from hf_kvcache.planning.verify import references

RATIOS = (4, 8, 16)
# the widths whose bytes are nearest to a ratio
WIDTHS = {4: (4, 3), 8: (2, 2)}
DOCUMENTS = ("topics", "play")


def plan_path(model: str, ratio: int) -> str:
    """Where a plan is kept, from the root of the repository."""
    return f"examples/benchmarks/results/plans/{model}-{ratio}.safetensors"


# what plans are compared with on the held-back windows, by the ratio that they are nearest to
SINGLE: dict[int, tuple[tuple[str, dict[str, Any]], ...]] = {
    4: (("turboquant", {"key_bits": 4, "value_bits": 3}), ("kvzip", {"budget": 0.25})),
    8: (("turboquant", {"key_bits": 2, "value_bits": 2}), ("kvzip", {"budget": 0.125})),
    16: (("kvzip", {"budget": 0.0625}),),
}
BOTH = "kvzip+turboquant"
UNIFORM: dict[int, tuple[tuple[str, dict[str, Any]], ...]] = {
    4: (
        (BOTH, {"budget": 0.65, "key_bits": 8, "value_bits": 4}),
        (BOTH, {"budget": 0.9, "key_bits": 4, "value_bits": 4}),
    ),
    8: (
        (BOTH, {"budget": 0.45, "key_bits": 4, "value_bits": 4}),
        (BOTH, {"budget": 0.51, "key_bits": 4, "value_bits": 3}),
    ),
    16: (
        (BOTH, {"budget": 0.22, "key_bits": 4, "value_bits": 4}),
        (BOTH, {"budget": 0.255, "key_bits": 4, "value_bits": 3}),
    ),
}
# asked for, so that what a cache holds beside its entries does not make it larger than wanted
ASKED = 1.02


def tuned(options: argparse.Namespace) -> None:
    """Measures once, saves a plan for every ratio, and compares it with others on the windows held back."""
    (RESULTS / "plans").mkdir(parents=True, exist_ok=True)
    for name, model, tokenizer in real_models([options.model]):
        start = time.process_time()
        tuner = Tuner(model, tokenizer, say=print)
        costs = tuner.costs
        measuring = time.process_time() - start
        full = references(model, tuner.held)
        for ratio in RATIOS:
            plan, expected = solve(costs, ASKED * ratio, tuner.fingerprint)
            plan.save(plan_path(name, ratio))
            listed = [("plan", {"plan": plan}), *SINGLE[ratio], *UNIFORM[ratio]]
            for method, chosen in listed:
                named = None if method == "plan" else method
                found = verify(model, tokenizer, tuner.held, full, named, **chosen)
                # what is only evicted from is held in the dtype of the model
                halved = 1 if method != "kvzip" else model.dtype.itemsize / 2
                row = {
                    "model": name,
                    "ratio": ratio,
                    "method": method if method == "plan" else f"{method} {json.dumps(chosen)}",
                    "times_smaller_than_16_bit": found.ratio * halved,
                    "kl_continuation": found.continuation,
                    "kl_quotation": found.quotation,
                    "kl_expected": expected if method == "plan" else None,
                    "measuring_processor_seconds": measuring if method == "plan" else None,
                    "plan": plan.summary() if method == "plan" else None,
                }
                add_results("plans_held_back", row, ("model", "ratio", "method"))


def compared(options: argparse.Namespace) -> None:
    """Adds our rows to `plans.csv`: plans, and the single methods nearest to each ratio."""
    available = texts(None)
    for name, model, tokenizer in real_models([options.model]):
        for text in options.documents:
            made = document(tokenizer, text, available[text])
            for ratio in options.ratios:
                methods = [f"none{json.dumps({'plan': plan_path(name, ratio)})}"]
                if ratio in WIDTHS:
                    key_bits, value_bits = WIDTHS[ratio]
                    methods.append(f"turboquant{json.dumps({'key_bits': key_bits, 'value_bits': value_bits})}")
                for named, kept in ((methods, None), (options.eviction, 1 / ratio)):
                    settings = SimpleNamespace(backend="ours", methods=named, kept=[kept], aware=False, name="plans")
                    run(name, model, tokenizer, made, settings)  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("tune", "compare"))
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--ratios", nargs="+", type=int, default=RATIOS)
    parser.add_argument("--documents", nargs="+", default=DOCUMENTS)
    parser.add_argument("--eviction", nargs="*", default=["kvzip", "snapkv"])
    options = parser.parse_args()
    {"tune": tuned, "compare": compared}[options.part](options)


if __name__ == "__main__":
    main()
