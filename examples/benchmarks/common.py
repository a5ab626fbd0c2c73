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
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

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


def windows(tokenizer: Any, text: str, count: int, length: int) -> torch.Tensor:
    """`[count, length]` token ids, spread evenly over a text."""
    ids = torch.tensor(tokenizer(text[:400_000], add_special_tokens=False)["input_ids"])
    starts = torch.linspace(0, len(ids) - length, count).long()
    return torch.stack([ids[start : start + length] for start in starts])


def write_results(name: str, rows: list[dict[str, Any]]) -> None:
    """Prints the rows and writes `results/<name>.csv`, each row with the command and the versions that made it."""
    made_by = {
        "command": shlex.join(["python", *sys.argv]),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "processor": platform.machine(),
    }
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*(_text(value) for value in row.values()))
    Console(width=200).print(table)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *made_by], lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: _text(value) for key, value in (row | made_by).items()} for row in rows)
    print(f"wrote {path}")


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
