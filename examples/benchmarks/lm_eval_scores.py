"""lm-eval: are the scores of `method=None` those of its own model, are those of a compressed cache others that can be
had again, and how fast is it?

Models, and first and second runs, take turns task by task. Seconds are of the processor.

    pip install -e '.[lm-eval]'
    python examples/benchmarks/lm_eval_scores.py --limit 4
"""

from __future__ import annotations

import argparse
import logging
import time
from typing import Any

import lm_eval
from common import real_models, write_results
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from hf_kvcache import unpatch_model
from hf_kvcache.integrations.lm_eval import TASKS, KVCacheLM

METHODS: dict[str, dict[str, Any]] = {
    "none": {},
    "snapkv 25%": {"method": "snapkv", "budget": 0.25},
    "turboquant 2": {"method": "turboquant", "bits": 2},
}


def answers(lm: Any, task: str, manager: TaskManager, limit: int) -> tuple[list[float | str], float]:
    """What a model answers to the first documents of a task, and the seconds that it takes."""
    start = time.process_time()
    found = lm_eval.simple_evaluate(lm, tasks=[task], task_manager=manager, limit=limit, bootstrap_iters=0)
    seconds = time.process_time() - start
    first = [sample["filtered_resps"][0] for sample in found["samples"][task]]
    return [answer if isinstance(answer, (str, float)) else float(answer[0]) for answer in first], seconds


def difference(one: list[float | str], other: list[float | str]) -> float:
    """The largest difference of a log-likelihood, relative where it is below -1; generated texts are equal or not."""
    gaps = [
        float(mine != theirs) if isinstance(mine, str) else abs(mine - float(theirs)) / max(abs(mine), 1)
        for mine, theirs in zip(one, other, strict=True)
    ]
    return max(gaps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=4, help="documents a task")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--model", default="smollm2")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    tasks = sorted(path.stem for path in TASKS.glob("[!_]*.yaml"))
    rows = []
    for name, model, tokenizer in real_models([options.model]):
        for task in (f"hfkv_{stem}" for stem in tasks):
            unpatch_model(model)
            own, own_seconds = answers(
                HFLM(model, tokenizer=tokenizer, batch_size=options.batch_size), task, manager, options.limit
            )
            for method, chosen in METHODS.items():
                unpatch_model(model)
                lm = KVCacheLM(model, tokenizer=tokenizer, batch_size=options.batch_size, **chosen)
                (first, seconds), (second, _) = (answers(lm, task, manager, options.limit) for _ in range(2))
                rows.append(
                    {
                        "model": name,
                        "task": task,
                        "method": method,
                        "documents": len(own),
                        "difference_to_lm_eval": difference(own, first),
                        "difference_of_a_second_run": difference(first, second),
                        "speed_to_lm_eval": own_seconds / seconds,
                    }
                )
                print(rows[-1], flush=True)
    write_results("lm_eval_scores", rows)


if __name__ == "__main__":
    main()
