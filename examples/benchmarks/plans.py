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

from common import RESULTS, add_results, real_models
from peer_protocol import document, texts
from peers import run

from hf_kvcache.planning import Tuner

RATIOS = (4, 8, 16)
# the widths whose bytes are nearest to a ratio
WIDTHS = {4: (4, 3), 8: (2, 2)}
DOCUMENTS = ("topics", "play")


def plan_path(model: str, ratio: int) -> str:
    """Where a plan is kept, from the root of the repository."""
    return f"examples/benchmarks/results/plans/{model}-{ratio}.safetensors"


def tuned(options: argparse.Namespace) -> None:
    """Measures once, and saves a plan for every ratio."""
    (RESULTS / "plans").mkdir(parents=True, exist_ok=True)
    for name, model, tokenizer in real_models([options.model]):
        start, processor = time.perf_counter(), time.process_time()
        tuner = Tuner(model, tokenizer, say=print)
        for ratio in RATIOS:
            found = tuner.tune(ratio)
            found.plan.save(plan_path(name, ratio))
            row = {
                "model": name,
                "ratio": ratio,
                "ratio_held": found.verified.ratio,
                "kl_expected": found.expected,
                "kl_continuation": found.verified.continuation,
                "kl_quotation": found.verified.quotation,
                "unmeasured_ratio": found.uniform.ratio,
                "unmeasured_kl_continuation": found.uniform.continuation,
                "unmeasured_kl_quotation": found.uniform.quotation,
                # of this ratio and all before it; the measuring is in the first
                "seconds": time.perf_counter() - start,
                "processor_seconds": time.process_time() - processor,
                "plan": found.plan.summary(),
            }
            add_results("plans_tuning", row, ("model", "ratio"))


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
