"""What the models can do at all: every task with the full cache, float32.

A task that the uncompressed model fails says nothing about compression. A row is a task at a length: accuracy, answer
NLL with a bootstrap interval over contexts, and the NLL of the same answers without the context, which is what a
method that forgets everything would get. `hf_kvcache.evaluation.SUITE` is chosen from this table.

    python examples/benchmarks/tasks.py [--models smollm2 qwen-coder] [--cells niah-4@512x6 kv-40x4]
"""

from __future__ import annotations

import argparse
import re
import time
from typing import Any, NamedTuple

import torch
from common import prose, real_models, write_results

from hf_kvcache.evaluation import Task, bootstrap, context_ids, filled_cache, make_task, score_answers

# task, tokens of its context where they are free, and how many contexts
CELLS = {
    "smollm2": "passkey@1024x4 niah-1@512x6 niah-1@1024x6 niah-1@2048x3 niah-1@4096x1 niah-4@512x6 niah-8@1024x4 "
    "kv-20x4 kv-40x4 func-8x4 func-20x4 tracking-1@256x12",
    "qwen-coder": "passkey@1024x2 niah-1@1024x4 niah-4@512x4 niah-8@1024x4 niah-8@2048x1 kv-20x3 kv-40x4 kv-100x2 "
    "func-20x3 func-50x3 tracking-1@256x12",
}


class Cell(NamedTuple):
    """One row to measure."""

    task: str
    length: int | None
    contexts: int

    @classmethod
    def read(cls, text: str) -> Cell:
        found = re.fullmatch(r"([a-z]+(?:-\d+)?)(?:@(\d+))?x(\d+)", text)
        if found is None:
            raise SystemExit(f"a cell is TASK@LENGTHxCONTEXTS or TASKxCONTEXTS, got {text!r}")
        return cls(found[1], int(found[2]) if found[2] else None, int(found[3]))


def measured(model: Any, tokenizer: Any, cell: Cell) -> dict[str, Any]:
    """Scores one cell with the full cache."""
    exact, nll, alone, tokens, start = [], [], [], [], time.process_time()
    for seed in range(cell.contexts):
        task = make_task(cell.task, tokenizer, seed, cell.length, prose(seed))
        ids = context_ids(model, tokenizer, task.context)
        answers = score_answers(model, tokenizer, filled_cache(model, ids), task)
        tokens.append(ids.shape[1])
        exact.append([answer.exact for answer in answers])
        nll.append([answer.nll for answer in answers])
    empty = Task(task.name, "\n", task.questions)
    for answer in score_answers(model, tokenizer, filled_cache(model, context_ids(model, tokenizer, "\n")), empty):
        alone.append(answer.nll)
    accuracy, loss = bootstrap(exact), bootstrap(nll)
    return {
        "task": cell.task,
        "tokens": sum(tokens) // len(tokens),
        "contexts": cell.contexts,
        "answers": sum(map(len, exact)),
        "accuracy": accuracy.value,
        "accuracy_low": accuracy.low,
        "accuracy_high": accuracy.high,
        "nll": loss.value,
        "nll_low": loss.low,
        "nll_high": loss.high,
        "nll_without_context": sum(alone) / len(alone),
        "cpu_seconds": time.process_time() - start,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=CELLS, default=list(CELLS))
    parser.add_argument("--cells", nargs="+", help="instead of those of the models, and printed only")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    rows = []
    for name, model, tokenizer in real_models(options.models):
        for cell in map(Cell.read, options.cells or CELLS[name].split()):
            rows.append({"model": name, **measured(model, tokenizer, cell)})
            print({key: round(value, 3) if isinstance(value, float) else value for key, value in rows[-1].items()})
    if rows and not options.cells:
        write_results("tasks", rows)


if __name__ == "__main__":
    main()
