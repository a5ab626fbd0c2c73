"""What the benchmark scripts share: texts, the table on screen, and the CSV with the command that made it."""

from __future__ import annotations

import argparse
import ast
import csv
import inspect
import platform
import shlex
import subprocess
import sys
import typing
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

from hf_kvcache.real_models import REAL_MODELS

RESULTS = Path(__file__).parent / "results"
TEST_TEXTS = Path(__file__).parents[2] / "tests" / "data"


def evaluation_texts() -> dict[str, str]:
    """Texts of domains that the shipped calibration sample does not have, by domain.

    The manual and the code come from the running Python: the help topics of `pydoc` and modules of its library.
    """
    return {
        "manual": "\n".join(text for _, text in sorted(topics.items())),
        "code": "\n".join(inspect.getsource(module) for module in (argparse, subprocess, typing, ast)),
        "encyclopedia": (TEST_TEXTS / "encyclopedia.txt").read_text(encoding="utf-8"),
        "play": (TEST_TEXTS / "play.txt").read_text(encoding="utf-8"),
    }


def prose(seed: int) -> str:
    """Filler for a task: seeds take novel, speeches and encyclopedia in turn."""
    domain = ("novel", "speeches", "encyclopedia")[seed % 3]
    return (TEST_TEXTS / f"{domain}.txt").read_text(encoding="utf-8")


def real_models(names: Iterable[str]) -> Iterator[tuple[str, Any, Any]]:
    """Name, model in float32 and tokenizer of those that can be loaded; says why another one is left out."""
    for name in names:
        if REAL_MODELS[name].available:
            yield name, *REAL_MODELS[name].load()
        else:
            print(f"skipping {name}: it is not installed; run: {REAL_MODELS[name].install}")


def windows(tokenizer: Any, text: str, count: int, length: int) -> torch.Tensor:
    """`[count, length]` token ids, spread evenly over a text."""
    ids = torch.tensor(tokenizer(text[:400_000], add_special_tokens=False)["input_ids"])
    starts = torch.linspace(0, len(ids) - length, count).long()
    return torch.stack([ids[start : start + length] for start in starts])


def write_results(name: str, rows: list[dict[str, Any]]) -> None:
    """Prints the rows and writes `results/<name>.csv`, each row with the command and the versions that made it."""
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*(_text(value) for value in row.values()))
    Console(width=200).print(table)
    _write(name, [row | made_by() for row in rows])


def add_results(name: str, row: dict[str, Any], key: Sequence[str]) -> None:
    """Prints a row and adds it to `results/<name>.csv`; it replaces the row with the same values of `key`.

    A row may bring columns that the table has not had: earlier rows are left blank there.
    """
    row = {column: _text(value) for column, value in (row | made_by()).items()}
    path = RESULTS / f"{name}.csv"
    rows = read_results(name) if path.exists() else []
    if rows and not set(rows[0]) <= set(row):
        raise ValueError(f"{path} has columns that the row to add has not; move it away: {set(rows[0]) - set(row)}")
    print({column: value for column, value in row.items() if column not in made_by()})
    others = [other for other in rows if any(other[column] != row[column] for column in key)]
    _write(name, [{column: other.get(column) for column in row} for other in others] + [row])


def read_results(name: str) -> list[dict[str, str]]:
    """The rows of `results/<name>.csv`."""
    with (RESULTS / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def made_by() -> dict[str, Any]:
    """The command and the versions that make a row."""
    return {
        "command": shlex.join(["python", *sys.argv]),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "processor": platform.machine(),
    }


def kl_against_ratio(axes: Any, ticks: Sequence[int], label: str) -> None:
    """Finishes a picture of KL against how many times smaller something is, both logarithmic.

    Args:
        axes: of matplotlib, with all lines drawn.
        ticks: of the ratio.
        label: what the ratio is.
    """
    from matplotlib.ticker import FixedLocator, NullLocator

    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([f"{tick}x" for tick in ticks])
    axes.set_xlabel(label)
    axes.set_ylabel("KL, nats a token (less is better)")
    axes.grid(which="major", alpha=0.3)
    axes.legend(fontsize=8)


def _write(name: str, rows: list[dict[str, Any]]) -> None:
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0]], lineterminator="\n")
        writer.writeheader()
        writer.writerows({column: _text(value) for column, value in row.items()} for row in rows)
    print(f"wrote {path}")


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)
