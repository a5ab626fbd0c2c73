"""CriticalKV over its hosts, on retrieval and continuations: how much of the loss against the full cache it takes away.

Question-agnostic: the context is compressed before any question is known. For every model, task, budget and host the
loss against the full cache, without and with CriticalKV, and the share of the loss that it takes away. Intervals
resample contexts (95 %, paired). Loss is of accuracy where the full cache answers well, and always of the answer's NLL;
for continuations it is KL(full || method) in nats a token.

    python examples/benchmarks/eviction_tasks.py [--models smollm2 qwen-coder] [--contexts 1.0]

The head importances of HeadKV are measured first, as `hf-kvcache calibrate headkv` does, and kept for the next run.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

import torch
from common import evaluation_texts, prose, real_models, windows, write_results
from one_prefill import check, evicted, record, spec_of
from torch import Tensor

from hf_kvcache import measure_heads, patch_model, unpatch_model
from hf_kvcache.evaluation import SUITE, bootstrap, context_ids, make_task, score_answers
from hf_kvcache.measure import continued, kl_divergence

HOSTS = ("snapkv", "adakv", "headkv")
BUDGETS = (0.2, 0.4)
WINDOW = 32
# continuations: tokens before and after the compression
PREFIX, CONTINUATION = 1024, 160

Loss = dict[tuple[str, float, bool], list[list[float]]]


def variants(importance: str) -> dict[tuple[str, float, bool], tuple[str, dict[str, Any]]]:
    """(host, budget, critical) -> method and options."""
    result = {}
    for host, budget, critical in itertools.product(HOSTS, BUDGETS, (False, True)):
        options: dict[str, Any] = {"budget": budget, "window": WINDOW}
        if host == "headkv":
            options["importance"] = importance
        result[host, budget, critical] = (host + "+criticalkv" * critical, options)
    return result


def head_importance(name: str, model: Any, tokenizer: Any, folder: Path) -> str:
    """The file of measured head importances, made when it is missing."""
    path = folder / f"heads-{name}.safetensors"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        measure_heads(model, tokenizer=tokenizer).save(path)
    return str(path)


class Trial:
    """One model: every method on one prefill of every context."""

    def __init__(self, name: str, model: Any, tokenizer: Any, folder: Path) -> None:
        self.model, self.tokenizer = model, tokenizer
        methods = variants(head_importance(name, model, tokenizer, folder))
        self.specs = {key: spec_of(model, tokenizer, method, **kw) for key, (method, kw) in methods.items()}
        ids = torch.arange(100, 500)[None]
        observations = record(model, ids, WINDOW)
        for method, options in methods.values():
            check(model, tokenizer, ids, observations, method, **options)
        self.full = spec_of(model, tokenizer, None)
        # any patch that shares no layers reads any of these caches
        patch_model(model)

    def observe(self, ids: Tensor) -> list[Any]:
        unpatch_model(self.model)
        observations = record(self.model, ids, WINDOW)
        patch_model(self.model)
        return observations

    def answers(self, task: str, length: int | None, contexts: int) -> tuple[Loss, Loss, list, list]:
        """Losses of accuracy and of NLL by method and context, and both of the full cache."""
        accuracy: Loss = {key: [] for key in self.specs}
        nll: Loss = {key: [] for key in self.specs}
        full_accuracy, full_nll = [], []
        for seed in range(contexts):
            made = make_task(task, self.tokenizer, 100 + seed, length, prose(seed))
            observations = self.observe(context_ids(self.model, self.tokenizer, made.context))
            best = score_answers(self.model, self.tokenizer, evicted(self.full, observations), made)
            full_accuracy.append([float(answer.exact) for answer in best])
            full_nll.append([answer.nll for answer in best])
            for key, spec in self.specs.items():
                own = score_answers(self.model, self.tokenizer, evicted(spec, observations), made)
                accuracy[key].append([float(b.exact) - float(o.exact) for b, o in zip(best, own, strict=True)])
                nll[key].append([o.nll - b.nll for b, o in zip(best, own, strict=True)])
        return accuracy, nll, full_accuracy, full_nll

    def continuations(self, text: str, count: int) -> Loss:
        """KL against the full cache by method and window."""
        kl: Loss = {key: [] for key in self.specs}
        for ids in windows(self.tokenizer, text, count, PREFIX + CONTINUATION):
            observations = self.observe(ids[None, :PREFIX])
            rest = ids[None, PREFIX:]
            best = continued(self.model, evicted(self.full, observations), rest, PREFIX)
            for key, spec in self.specs.items():
                own = continued(self.model, evicted(spec, observations), rest, PREFIX)
                kl[key].append([kl_divergence(best, own)])
        return kl


def rows_of(model: str, task: str, metric: str, loss: Loss, full: float) -> list[dict[str, Any]]:
    """One row for every host and budget."""
    rows = []
    for host, budget in itertools.product(HOSTS, BUDGETS):
        without, with_critical = loss[host, budget, False], loss[host, budget, True]
        cut = bootstrap(without, with_critical, statistic=lambda a, b: 1 - b / a.clamp_min(1e-9))
        difference = bootstrap(without, with_critical, statistic=lambda a, b: a - b)
        rows.append(
            {
                "model": model,
                "task": task,
                "metric": metric,
                "full": full,
                "host": host,
                "budget": budget,
                "contexts": len(without),
                "loss": bootstrap(without).value,
                "loss_with_criticalkv": bootstrap(with_critical).value,
                "less": difference.value,
                "less_low": difference.low,
                "less_high": difference.high,
                "share_taken_away": cut.value,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SUITE, default=list(SUITE))
    parser.add_argument("--contexts", type=float, default=1.0, help="share of the contexts of the suite to take")
    parser.add_argument("--windows", type=int, default=3, help="of every domain that is continued")
    parser.add_argument("--importance", type=Path, default=Path.home() / ".cache" / "hf_kvcache")
    parser.add_argument("--name", default="eviction_tasks", help="of the CSV in results/")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    rows: list[dict[str, Any]] = []
    for name, model, tokenizer in real_models(options.models):
        trial = Trial(name, model, tokenizer, options.importance)
        for cell in SUITE[name]:
            count = max(1, round(cell.contexts * options.contexts))
            accuracy, nll, full_accuracy, full_nll = trial.answers(cell.task, cell.length, count)
            if cell.accurate:
                rows += rows_of(name, cell.task, "accuracy", accuracy, bootstrap(full_accuracy).value)
            rows += rows_of(name, cell.task, "answer NLL", nll, bootstrap(full_nll).value)
            print(name, cell.task, {key: round(bootstrap(loss).value, 3) for key, loss in nll.items()}, flush=True)
        for domain, text in evaluation_texts().items():
            kl = trial.continuations(text, options.windows)
            rows += rows_of(name, f"continuation: {domain}", "KL", kl, 0.0)
            print(name, domain, {key: round(bootstrap(loss).value, 4) for key, loss in kl.items()}, flush=True)
        unpatch_model(model)
    for model, metric, host in itertools.product(options.models, ("accuracy", "answer NLL", "KL"), HOSTS):
        mine = [row for row in rows if (row["model"], row["metric"], row["host"]) == (model, metric, host)]
        if mine:
            before, after = (sum(row[key] for row in mine) for key in ("loss", "loss_with_criticalkv"))
            wins = sum(row["less"] > 0 for row in mine)
            print(
                f"{model} {metric} {host}: loss {before:.3f} -> {after:.3f} ({1 - after / before:+.0%}), "
                f"better in {wins} of {len(mine)}"
            )
    write_results(options.name, rows)


if __name__ == "__main__":
    main()
