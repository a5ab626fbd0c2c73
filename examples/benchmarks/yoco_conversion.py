"""Converting SmolLM2-135M to YOCO: divergence, loss and retrieval against training tokens, next to KVSharer. Float32.

KL and loss are of 160 tokens after a prefix of 512, teacher-forced through the cache, on texts of domains that neither
calibration nor training has seen. Retrieval is one needle in 512 tokens and a list of 20 pairs, scored by the answer's
NLL and by whether every token of it is the most likely one. KVSharer's plan at 22 of 30 layers is the healed one of
kvsharer_healing.csv; at 15 it pairs neighbours, and is healed alike.

    python examples/benchmarks/yoco_conversion.py --split 22 --init reuse mean ridge heal kvsharer untouched
    python examples/benchmarks/yoco_conversion.py --split 22 --trained runs/yoco-22-50k/model --tokens 50000

Rows are added to the table, or replace those of the same split and arm.
"""

from __future__ import annotations

import argparse
import copy
import csv
import re
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from common import RESULTS, add_results, prose
from kvsharer import Judge
from transformers import AutoModelForCausalLM

import hf_kvcache.models  # noqa: F401 - reads converted models
from hf_kvcache import KVSharer, SharingPlan, convert, find_plan, patch_model, smollm2
from hf_kvcache.evaluation import bootstrap, context_ids, filled_cache, make_task, score_answers
from hf_kvcache.measure import kl_divergence, top1_agreement

TASKS = {"niah-1": (512, 4), "kv-20": (None, 3)}


def shared_plan(model: Any, tokenizer: Any, kept: int) -> SharingPlan:
    """KVSharer's plan in which so many layers keep their KV, healed."""
    layers = model.config.num_hidden_layers
    if kept == 22:
        with (RESULTS / "kvsharer_healing.csv").open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["order"] == "kl" and row["layers_shared"] == "8"]
        pairs = [(int(a), int(b)) for a, b in re.findall(r"(\d+)<-(\d+)", rows[0]["plan"])]
    else:
        pairs = [(layer, layer - 1) for layer in range(layers - 1, 0, -1) if layer % 2][: layers - kept]
    return find_plan(model, FixedPlan(plan=SharingPlan.from_pairs(layers, pairs)), tokenizer=tokenizer)


class FixedPlan(KVSharer):
    """KVSharer without its search: the plan that is given, healed."""

    def find_plan(self, model: Any) -> SharingPlan:
        model.use_texts(self.calibration, 30, 64)
        return model.heal(self.plan)


def arm(name: str, model: Any, tokenizer: Any, split: int, trained: Path | None) -> Any:
    """The model to score."""
    if trained is not None:
        return AutoModelForCausalLM.from_pretrained(trained, dtype=torch.float32).eval()
    own = copy.deepcopy(model)
    if name == "untouched":
        return patch_model(own, None)
    if name == "kvsharer":
        return patch_model(own, KVSharer(plan=shared_plan(own, tokenizer, split)))
    return convert(own, "yoco", split=split, init=name, tokenizer=tokenizer)


def scores(model: Any, tokenizer: Any, judge: Judge) -> dict[str, Any]:
    """Means over domains, and the tasks."""
    judge.model = model
    rows = []
    for domain, full in judge.full.items():
        pairs = list(zip(full, judge.answers(domain), strict=True))
        rows.append(
            (
                mean(kl_divergence(*pair) for pair in pairs),
                mean(after.loss - before.loss for before, after in pairs),
                mean(top1_agreement(*pair) for pair in pairs),
                pairs[0][1].kv_bytes / pairs[0][0].kv_bytes,
            )
        )
    names = ("kl", "loss_increase", "top1", "kv_bytes_of_full")
    found: dict[str, Any] = dict(zip(names, (mean(column) for column in zip(*rows, strict=True)), strict=True))
    for name, (length, contexts) in TASKS.items():
        exact, nll = [], []
        for seed in range(contexts):
            task = make_task(name, tokenizer, seed, length, prose(seed))
            cache = filled_cache(model, context_ids(model, tokenizer, task.context))
            answers = score_answers(model, tokenizer, cache, task)
            exact.append([float(answer.exact) for answer in answers])
            nll.append([answer.nll for answer in answers])
        found |= {f"{name} answers": sum(map(len, exact)), f"{name} accuracy": bootstrap(exact).value}
        found[f"{name} nll"] = bootstrap(nll).value
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", type=int, required=True, help="layers of 30 that keep their KV")
    parser.add_argument("--init", nargs="+", default=[], help="arms without training")
    parser.add_argument("--trained", type=Path, help="folder of a converted and trained model")
    parser.add_argument("--tokens", type=int, default=0, help="that it was trained on")
    parser.add_argument("--windows", type=int, default=1, help="evaluation windows a domain")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    model, tokenizer = smollm2.load()
    judge = Judge(model, tokenizer, options.windows)
    for name in [*options.init, *(["heal"] if options.trained else [])]:
        subject = arm(name, model, tokenizer, options.split, options.trained if name == "heal" else None)
        row = {"split": options.split, "arm": name, "tokens": options.tokens if options.trained else 0}
        add_results("yoco_conversion", row | scores(subject, tokenizer, judge), key=("split", "arm", "tokens"))


if __name__ == "__main__":
    main()
