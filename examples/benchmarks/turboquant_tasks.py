"""Retrieval from codes: the tasks that SmolLM2-135M solves with a full cache, from TurboQuant's codes of that cache.

Question-agnostic: the context is read once, sealed as each setting stores it, and every question is asked on a copy.
`accuracy_lost` and `nll_added` are paired differences to the full cache, with 95 % intervals over contexts; `all`
takes every answer of every task. Accuracy counts where the full cache answers well (see `SUITE`).

    python examples/benchmarks/turboquant_tasks.py [--contexts 1.0]
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from common import prose, real_models, write_results
from one_prefill import evicted, record, spec_of

from hf_kvcache import compress, patch_model, unpatch_model
from hf_kvcache.evaluation import SUITE, bootstrap, context_ids, make_task, score_answers

SETTINGS = {
    "8 bits": {"bits": 8},
    "4 bits": {"bits": 4},
    "3 bits": {"bits": 3},
    "2 bits": {"bits": 2},
}

# by setting the values of every context, one for each answer
Scores = dict[str, list[list[float]]]


def check(model: Any, specs: dict[str, Any]) -> None:
    """Raises unless a recorded prefill is sealed exactly as a real one."""
    ids = torch.arange(100, 500)[None]
    observations = record(model, ids)
    for name, options in SETTINGS.items():
        patch_model(model, "turboquant", **options)
        real = compress(model, ids)
        unpatch_model(model)
        for mine, other in zip(evicted(specs[name], observations).layers, real.layers, strict=True):
            pairs = zip(mine.segments[0].tensors(), other.segments[0].tensors(), strict=True)
            if other.tail.length or not all(torch.equal(a, b) for a, b in pairs):
                raise AssertionError(f"turboquant, {name}, seals a recorded prefill otherwise than its own")


def row_of(task: str, name: str, full: Scores, own: Scores, accurate: bool) -> dict[str, Any]:
    """One row: losses against the full cache."""
    row: dict[str, Any] = {"task": task, "setting": name, "contexts": len(full["nll"])}
    row["answers"] = sum(map(len, full["nll"]))
    added = bootstrap(own["nll"], full["nll"], statistic=lambda a, b: a - b)
    lost = bootstrap(full["exact"], own["exact"], statistic=lambda a, b: a - b)
    shown = (bootstrap(full["exact"]).value, lost.value, lost.low, lost.high) if accurate else ("", "", "", "")
    row |= dict(zip(("full_accuracy", "accuracy_lost", "accuracy_lost_low", "accuracy_lost_high"), shown, strict=True))
    return row | {
        "full_nll": bootstrap(full["nll"]).value,
        "nll_added": added.value,
        "nll_added_low": added.low,
        "nll_added_high": added.high,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=float, default=1.0, help="share of the contexts of the suite to take")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    rows = []
    for name, model, tokenizer in real_models(["smollm2"]):
        specs = {"full": spec_of(model, tokenizer, None)}
        specs |= {setting: spec_of(model, tokenizer, "turboquant", **kw) for setting, kw in SETTINGS.items()}
        check(model, specs)
        everything: dict[tuple[str, bool], Scores] = {}
        for cell in SUITE[name]:
            scores: dict[str, Scores] = {setting: {"exact": [], "nll": []} for setting in specs}
            for seed in range(max(1, round(cell.contexts * options.contexts))):
                task = make_task(cell.task, tokenizer, 100 + seed, cell.length, prose(seed))
                observations = record(model, context_ids(model, tokenizer, task.context))
                patch_model(model)
                for setting, spec in specs.items():
                    answers = score_answers(model, tokenizer, evicted(spec, observations), task)
                    scores[setting]["exact"].append([float(answer.exact) for answer in answers])
                    scores[setting]["nll"].append([answer.nll for answer in answers])
                unpatch_model(model)
            for setting in SETTINGS:
                rows.append(row_of(cell.task, setting, scores["full"], scores[setting], cell.accurate))
            for setting, found in scores.items():
                pooled = everything.setdefault((setting, cell.accurate), {"exact": [], "nll": []})
                for key, values in found.items():
                    pooled[key] += values
            print(rows[-len(SETTINGS) :], flush=True)
        for accurate, title in ((True, "all, by accuracy"), (False, "all, by NLL")):
            for setting in SETTINGS:
                full, own = everything["full", accurate], everything[setting, accurate]
                rows.append(row_of(title, setting, full, own, accurate))
    write_results("turboquant_tasks", rows)


if __name__ == "__main__":
    main()
