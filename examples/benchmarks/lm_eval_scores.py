"""lm-eval: are the scores of `method=None` those of its own model, are those of a compressed cache others that can be
had again, and how fast is it?

`scores` runs the first documents of every offline task: lm-eval's own model, ours with nothing lost, and a compressed
cache twice. A log-likelihood is a float32 sum over up to some hundred tokens, so its difference is also given relative
to its size where that is above one. `speed` takes turns between lm-eval's model and ours on some of the tasks; only
answering counts, not the making of documents.

    pip install -e '.[lm-eval]'
    python examples/benchmarks/lm_eval_scores.py scores --limit 2
    python examples/benchmarks/lm_eval_scores.py speed --limit 4
"""

from __future__ import annotations

import argparse
import logging
import time
from statistics import median
from typing import Any

import lm_eval
from common import add_results, real_models
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from hf_kvcache import unpatch_model
from hf_kvcache.integrations.lm_eval import TASKS, KVCacheLM

METHODS: dict[str, dict[str, Any]] = {
    "none": {},
    "snapkv+turboquant": {"method": "snapkv+turboquant", "budget": 0.25, "bits": 4},
}
ALL = sorted(f"hfkv_{path.stem}" for path in TASKS.glob("[!_]*.yaml"))
# of every kind of request: one answer after a context, several after one, texts that go on, generation
TIMED = ("hfkv_niah_1", "hfkv_kv_20", "hfkv_rolling", "hfkv_passkey")
REQUESTS = ("loglikelihood", "loglikelihood_rolling", "generate_until")
ROUNDS = 3
Answers = list[float | str]


def answers(lm: Any, task: str, manager: TaskManager, limit: int) -> tuple[Answers, float]:
    """What a model answers to the first documents of a task, and the seconds of the processor that answering takes."""
    seconds = [0.0]
    for name in REQUESTS:
        setattr(lm, name, timed(getattr(lm, name), seconds))
    try:
        found = lm_eval.simple_evaluate(lm, tasks=[task], task_manager=manager, limit=limit, bootstrap_iters=0)
    finally:
        for name in REQUESTS:
            delattr(lm, name)
    first = [sample["filtered_resps"][0] for sample in found["samples"][task]]
    return [answer if isinstance(answer, (str, float)) else float(answer[0]) for answer in first], seconds[0]


def timed(function: Any, seconds: list[float]) -> Any:
    """The function, which adds to `seconds[0]` the processor time that it took."""

    def run(*args: Any, **kwargs: Any) -> Any:
        start = time.process_time()
        try:
            return function(*args, **kwargs)
        finally:
            seconds[0] += time.process_time() - start

    return run


def differences(one: Answers, other: Answers) -> tuple[float, float]:
    """The largest difference of two log-likelihoods, and the largest relative to their size where that is above one.

    Generated texts are equal or differ by one.
    """
    gaps = []
    for mine, theirs in zip(one, other, strict=True):
        if isinstance(mine, str) or isinstance(theirs, str):
            gaps.append((float(mine != theirs),) * 2)
        else:
            gaps.append((abs(mine - theirs), abs(mine - theirs) / max(abs(theirs), 1)))
    return max(gap for gap, _ in gaps), max(gap for _, gap in gaps)


def scores(options: argparse.Namespace, manager: TaskManager) -> None:
    """Every task and method: differences to lm-eval's own model, and of a second run to the first."""
    for name, model, tokenizer in real_models([options.model]):
        given = {"tokenizer": tokenizer, "batch_size": options.batch_size}
        for task in options.tasks or ALL:
            unpatch_model(model)
            own, _ = answers(HFLM(model, **given), task, manager, options.limit)
            for method, chosen in METHODS.items():
                unpatch_model(model)
                lm = KVCacheLM(model, **given, **chosen)
                first, _ = answers(lm, task, manager, options.limit)
                second = answers(lm, task, manager, options.limit)[0] if chosen else first
                absolute, relative = differences(first, own)
                row = {
                    "model": name,
                    "task": task,
                    "method": method,
                    "documents": len(own),
                    "largest": max((abs(answer) for answer in own if not isinstance(answer, str)), default=None),
                    "difference_to_lm_eval": absolute,
                    "relative_difference": relative,
                    "difference_of_a_second_run": differences(second, first)[0] if chosen else None,
                }
                add_results("lm_eval_scores", row, ("model", "task", "method"))


def speed(options: argparse.Namespace, manager: TaskManager) -> None:
    """Processor seconds of lm-eval's own model and of ours with nothing lost, in turn; the median of the ratios."""
    for name, model, tokenizer in real_models([options.model]):
        given = {"tokenizer": tokenizer, "batch_size": options.batch_size}
        for task in options.tasks or TIMED:
            taken = []
            for _ in range(ROUNDS):
                unpatch_model(model)
                documents, theirs = answers(HFLM(model, **given), task, manager, options.limit)
                _, ours = answers(KVCacheLM(model, **given), task, manager, options.limit)
                taken.append((theirs, ours))
            ratios = [theirs / ours for theirs, ours in taken]
            row = {
                "model": name,
                "task": task,
                "documents": len(documents),
                "batch_size": options.batch_size,
                "seconds_lm_eval": median(theirs for theirs, _ in taken),
                "seconds_ours": median(ours for _, ours in taken),
                "speed_to_lm_eval": median(ratios),
                "lowest": min(ratios),
                "highest": max(ratios),
            }
            add_results("lm_eval_speed", row, ("model", "task"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("scores", "speed"))
    parser.add_argument("--tasks", nargs="+", choices=ALL, help="some of the tasks only; other rows stay")
    parser.add_argument("--limit", type=int, default=4, help="documents a task")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--model", default="smollm2")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    {"scores": scores, "speed": speed}[options.part](options, manager)


if __name__ == "__main__":
    main()
