"""Measured plans at 4, 8 and 16 times fewer bytes than in 16 bits, beside single methods and plans without measuring.

Plans are tuned on the shipped sample; `compare` judges them by the protocol of `peers.py` on other texts. The rows of
kvpress and transformers come from `peers.py` with the same documents, into the same table.

    python examples/benchmarks/plans.py tune
    python examples/benchmarks/plans.py compare
    python examples/benchmarks/peers.py --name plans --backend ours --documents topics play \\
        --methods 'auto{"target_ratio": 4}' 'auto{"target_ratio": 8}' 'auto{"target_ratio": 16}'
    python examples/benchmarks/peers.py --name plans --backend transformers --methods quanto4 quanto2 hqq4 \\
        --documents topics play
    PYTHONPATH=. peers/bin/python examples/benchmarks/peers.py --name plans --backend kvpress \\
        --methods snapkv expected_attention kvzip --kept 0.25 0.125 0.0625 --documents topics play
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator

from common import RESULTS, add_results, real_models
from peer_protocol import document, texts
from peers import add, reference

from hf_kvcache.planning import Tuner

RATIOS = (4, 8, 16)
# the widths whose bytes are nearest to a ratio, above and below it
WIDTHS = {4: ((4, 4), (4, 3)), 8: ((2, 2),)}
DOCUMENTS = ("topics", "play")


def plan_path(model: str, ratio: int) -> str:
    """Where a plan is kept, from the root of the repository."""
    return f"examples/benchmarks/results/plans/{model}-{ratio}.safetensors"


def tuned(options: argparse.Namespace) -> None:
    """Measures once, saves a plan for every ratio, and notes how long that took and what the held-back windows say."""
    (RESULTS / "plans").mkdir(parents=True, exist_ok=True)
    for name, model, tokenizer in real_models([options.model]):
        watch = Watch()
        tuner = Tuner(model, tokenizer, say=print, samples=options.windows, length=options.length, draws=options.draws)
        _ = tuner.costs  # measured when first asked for
        measuring = watch.read("measuring")
        watch = Watch()
        cheapest = min((pair.loss for pair in tuner.pairs), default=None)
        measuring |= {"cheapest_shared_pair": cheapest, **watch.read("pricing_pairs")}
        for ratio in options.ratios:
            watch = Watch()
            made = tuner.tune(ratio)
            made.plan.save(plan_path(name, ratio))
            row = {
                "model": name,
                "ratio": ratio,
                "windows": options.windows,
                "length": options.length,
                "draws": options.draws,
                "times_smaller_than_16_bit": made.verified.ratio,
                "kl_continuation": made.verified.continuation,
                "kl_quotation": made.verified.quotation,
                "kl_expected": made.expected,
                **measuring,
                **watch.read("verifying"),
                "plan": made.plan.summary(),
            }
            add_results("plans_tuning", row, ("model", "ratio"))


class Watch:
    """Seconds of the clock and of the processor since it was made: beside other work the first is the larger one."""

    def __init__(self) -> None:
        self.wall, self.processor = time.perf_counter(), time.process_time()

    def read(self, name: str) -> dict[str, float]:
        return {
            f"{name}_seconds": time.perf_counter() - self.wall,
            f"{name}_processor_seconds": time.process_time() - self.processor,
        }


def compared(options: argparse.Namespace) -> None:
    """Adds our rows to `plans.csv`: plans, and the single methods nearest to each ratio."""
    available = texts(None)
    for name, model, tokenizer in real_models([options.model]):
        for text in options.documents:
            made = document(tokenizer, text, available[text])
            full = reference(model, made)
            for method, kept in listed(name, options):
                add("plans", (name, "ours", method, kept, text, False), model, tokenizer, full, made)


def listed(model: str, options: argparse.Namespace) -> Iterator[tuple[str, float | None]]:
    """Methods as in `peers.py`, and the share of the tokens that each keeps."""
    for ratio in options.ratios:
        yield f"planned{json.dumps({'plan': plan_path(model, ratio)})}", None
    for ratio in options.ratios:
        for key_bits, value_bits in WIDTHS.get(ratio, ()):
            yield f"turboquant{json.dumps({'key_bits': key_bits, 'value_bits': value_bits})}", None
        for method in options.eviction:
            yield method, 1 / ratio


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("tune", "compare"))
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--windows", type=int, default=6, help="to measure on; half as many more are held back")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a window")
    parser.add_argument("--draws", type=int, default=12, help="samples of the gradient a question")
    parser.add_argument("--ratios", nargs="+", type=int, default=RATIOS)
    parser.add_argument("--documents", nargs="+", default=DOCUMENTS)
    parser.add_argument("--eviction", nargs="*", default=["kvzip", "snapkv"], help="single methods that keep 1/ratio")
    options = parser.parse_args()
    {"tune": tuned, "compare": compared}[options.part](options)


if __name__ == "__main__":
    main()
