"""KVSharer on SmolLM2-135M: which order of pairs finds the better plan, and what healing does to it. Float32.

Every plan is searched and healed on the shipped calibration sample, and scored on texts of domains with other sources:
after a prefix of 512 tokens the next 160 are teacher-forced through the cache. KL is KL(untouched || shared), in nats a
token.

    python examples/benchmarks/kvsharer.py orders     # published order, similar, three random ones, at 12.5 %
    python examples/benchmarks/kvsharer.py healing    # published and KL order, unhealed and healed, at 12.5 % and 25 %
"""

from __future__ import annotations

import argparse
import time
import warnings
from dataclasses import replace
from statistics import mean
from typing import Any

import torch
from common import evaluation_texts, windows, write_results

from hf_kvcache import KVSharer, SharingPlan, find_plan, find_plans, patch_model, smollm2, unpatch_model
from hf_kvcache.measure import Continuation, continuation, kl_divergence, top1_agreement

PREFIX, SCORED = 512, 160


class Judge:
    """The untouched model's answers on all evaluation windows, and the score of a plan against them."""

    def __init__(self, model: Any, tokenizer: Any, count: int) -> None:
        self.model = model
        self.ids = {
            domain: windows(tokenizer, text, count, PREFIX + SCORED + 1) for domain, text in evaluation_texts().items()
        }
        self.full = {domain: self.answers(domain) for domain in self.ids}

    def answers(self, domain: str) -> list[Continuation]:
        """The model's predictions, as it is now, on the windows of a domain."""
        return [continuation(self.model, window[None], PREFIX) for window in self.ids[domain]]

    def score(self, plan: SharingPlan) -> list[dict[str, Any]]:
        """KL, loss increase and agreement by domain, the mean over domains last."""
        patch_model(self.model, KVSharer(plan=plan))
        rows = []
        for domain, full in self.full.items():
            own = self.answers(domain)
            pairs = list(zip(full, own, strict=True))
            rows.append(
                {
                    "domain": domain,
                    "kl": mean(kl_divergence(*pair) for pair in pairs),
                    "loss_increase": mean(after.loss - before.loss for before, after in pairs),
                    "top1": mean(top1_agreement(*pair) for pair in pairs),
                    "kv_bytes_of_full": own[0].kv_bytes / full[0].kv_bytes,
                }
            )
        unpatch_model(self.model)
        rows.append({"domain": "mean", **{key: mean(row[key] for row in rows) for key in list(rows[0])[1:]}})
        return rows


def timed_plan(model: Any, tokenizer: Any, method: KVSharer) -> tuple[SharingPlan, float]:
    """A plan and the seconds that its search took."""
    start = time.perf_counter()
    with warnings.catch_warnings(record=True):
        plan = find_plan(model, method, tokenizer=tokenizer)
    return plan, time.perf_counter() - start


def text(plan: SharingPlan) -> str:
    return " ".join(f"{consumer}<-{plan.source_layers[consumer]}" for consumer in plan.consumers)


def orders(model: Any, tokenizer: Any, judge: Judge, share: float) -> None:
    """Unhealed plans by the order of their pairs. Every search is run twice, to see that it finds the same plan."""
    rows = []
    for order, seed in (("dissimilar", 0), ("similar", 0), ("random", 0), ("random", 1), ("random", 2)):
        method = KVSharer(share=share, order=order, seed=seed, heal=False)
        plan, seconds = timed_plan(model, tokenizer, method)
        again, _ = timed_plan(model, tokenizer, method)
        for score in judge.score(plan):
            rows.append(
                {
                    "share": share,
                    "order": f"{order} {seed}" if order == "random" else order,
                    "layers_shared": len(plan.consumers),
                    "search_seconds": seconds,
                    "same_plan_again": plan.source_layers == again.source_layers,
                    **score,
                    "plan": text(plan),
                }
            )
    write_results("kvsharer_orders", rows)


def healing(model: Any, tokenizer: Any, judge: Judge) -> None:
    """Plans of the published order and of the KL order, before and after healing."""
    shares, rows = (0.125, 0.25), []
    for order in ("dissimilar", "kl"):
        start = time.perf_counter()
        plans = find_plans(model, [KVSharer(share=share, order=order) for share in shares], tokenizer=tokenizer)
        seconds = time.perf_counter() - start
        for share, healed in zip(shares, plans, strict=True):
            for plan in (replace(healed, healed={}), healed):
                for score in judge.score(plan):
                    rows.append(
                        {
                            "share": share,
                            "order": order,
                            "healed": bool(plan.healed),
                            "layers_shared": len(plan.consumers),
                            "seconds_for_both_shares": seconds,
                            **score,
                            "plan": text(plan),
                        }
                    )
    write_results("kvsharer_healing", rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("orders", "healing"))
    parser.add_argument("--windows", type=int, default=4, help="evaluation windows a domain")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    model, tokenizer = smollm2.load()
    judge = Judge(model, tokenizer, options.windows)
    if options.part == "orders":
        orders(model, tokenizer, judge, share=0.125)
    else:
        healing(model, tokenizer, judge)


if __name__ == "__main__":
    main()
