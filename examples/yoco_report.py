"""The comparison table and the loss plot of `train_yoco.py --from-scratch`."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

from yoco_models import CONTROL, MODELS

from hf_kvcache.evaluation import bootstrap

sys.path.append(str(Path(__file__).parent / "benchmarks"))
from common import made_by

Runs = dict[str, dict[str, Any]]


def write_comparison(folder: Path, runs: Runs, table: Path | None = None) -> None:
    """Writes `comparison.csv`, or another file, and the plot beside it, and prints the table."""
    budget = json.loads((folder / "budget.json").read_text())
    rows = [row | made_by() for row in [*text_rows(runs, budget), *recall_rows(runs)]]
    path = table or folder / "comparison.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        print({name: value for name, value in row.items() if name not in made_by() and value != ""})
    plot(path.with_suffix(".png"), runs)
    print(f"wrote {path} and {path.with_suffix('.png')}")


def of(runs: Runs, task: str, model: str) -> list[dict[str, Any]]:
    """All runs of a model on a task, by seed."""
    return [run for name, run in sorted(runs.items()) if name.startswith(f"{task}/{model}/")]


def text_rows(runs: Runs, budget: dict[str, Any]) -> list[dict[str, Any]]:
    """Validation loss by model, with 95 % intervals over windows, and the paired difference to the Transformer."""
    rows = []
    plain = of(runs, "text", "transformer")
    for model in MODELS:
        own = of(runs, "text", model)
        if not own:
            continue
        # the contexts are windows of held-out documents, and each has a loss for every seed
        arms = [
            [list(losses) for losses in zip(*(run["losses"] for run in some), strict=True)] for some in (own, plain)
        ]
        loss = bootstrap(arms[0])
        difference = bootstrap(*arms, statistic=lambda mine, other: mine - other)
        by_seed = [mean(run["losses"]) - mean(other["losses"]) for run, other in zip(own, plain, strict=True)]
        rows.append(
            {
                "task": "text",
                "model": model,
                "parameters": own[0]["parameters"],
                "tokens": budget["tokens"],
                "seeds": len(own),
                "windows": len(own[0]["losses"]),
                "loss": f"{loss.value:.4f}",
                "loss_low": f"{loss.low:.4f}",
                "loss_high": f"{loss.high:.4f}",
                "difference": f"{difference.value:.4f}",
                "difference_low": f"{difference.low:.4f}",
                "difference_high": f"{difference.high:.4f}",
                "difference_by_seed": " ".join(f"{value:+.4f}" for value in by_seed),
                "accuracy": "",
                "steps": own[0]["curve"][-1][0],
                "cpu_seconds": f"{mean([run['seconds'] for run in own]):.0f}",
            }
        )
    return rows


def recall_rows(runs: Runs) -> list[dict[str, Any]]:
    """Accuracy of associative recall by model and seed."""
    columns = ("loss", "loss_low", "loss_high", "difference", "difference_low", "difference_high", "difference_by_seed")
    return [
        {
            "task": "recall",
            "model": model,
            "parameters": run["parameters"],
            "tokens": "",
            "seeds": f"seed {seed}",
            "windows": "",
            **dict.fromkeys(columns, ""),
            "accuracy": f"{run['accuracy']:.4f}",
            "steps": run["curve"][-1][0],
            "cpu_seconds": f"{run['seconds']:.0f}",
        }
        for model in (*MODELS, CONTROL)
        for seed, run in enumerate(of(runs, "recall", model))
    ]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def plot(path: Path, runs: Runs) -> None:
    """Training loss against steps, one panel a task, one line a run."""
    try:
        import matplotlib.pyplot as plt
    except ModuleNotFoundError:
        print("no plot: matplotlib is not installed")
        return
    tasks = [task for task in ("text", "recall") if any(name.startswith(task) for name in runs)]
    figure, axes = plt.subplots(1, len(tasks), figsize=(6 * len(tasks), 4), squeeze=False)
    for axis, task in zip(axes[0], tasks, strict=True):
        for color, model in enumerate((*MODELS, CONTROL)):
            for seed, run in enumerate(of(runs, task, model)):
                steps, losses = zip(*run["curve"], strict=True)
                axis.plot(steps, losses, color=f"C{color}", alpha=1 - 0.4 * seed, label=model if seed == 0 else None)
        axis.set(title=task, xlabel="step", ylabel="training loss (nats a token)")
        axis.legend()
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
