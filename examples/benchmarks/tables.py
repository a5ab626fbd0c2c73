"""Writes the tables of the README from the committed results, so that its figures are those of the CSV files.

python examples/benchmarks/tables.py
"""

from __future__ import annotations

import csv
import re
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parents[2] / "README.md"


def rows(name: str) -> list[dict[str, str]]:
    """The rows of one result."""
    with (RESULTS / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def markdown(header: list[str], lines: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *lines])


def speed_table() -> str:
    """Bytes and speed at 4k context."""
    lines = [
        [
            row["method"],
            f"{float(row['kv_bytes_of_default']):.3f}",
            f"{float(row['prefill_speedup']):.2f}",
            f"{float(row['decode_speedup']):.2f} ({float(row['decode_speedup_min']):.2f} to "
            f"{float(row['decode_speedup_max']):.2f})",
        ]
        for row in rows("speed_4096")
    ]
    return markdown(["method", "KV bytes", "prefill speed", "decode speed (lowest to highest)"], lines)


def healing_table() -> str:
    """Mean over the evaluation domains, unhealed and healed."""
    names = {"dissimilar": "dissimilar (published)", "kl": "kl (default)"}
    mean = [row for row in rows("kvsharer_healing") if row["domain"] == "mean"]
    lines = []
    for unhealed, healed in zip(mean[::2], mean[1::2], strict=True):
        lines.append(
            [
                f"{float(unhealed['share']):.1%}",
                names[unhealed["order"]],
                f"{float(unhealed['kl']):.2f}",
                f"{float(healed['kl']):.2f}",
                f"+{float(unhealed['loss_increase']):.2f}",
                f"+{float(healed['loss_increase']):.2f}",
                f"{float(healed['top1']):.0%}",
            ]
        )
    header = ["share", "order", "KL", "KL healed", "loss", "loss healed", "same top token, healed"]
    return markdown(header, sorted(lines))


def orders_table() -> str:
    """The orders of pairs at one share, unhealed."""
    lines = [
        [row["order"], f"{float(row['kl']):.2f}", f"{float(row['search_seconds']):.0f} s", row["plan"]]
        for row in rows("kvsharer_orders")
        if row["domain"] == "mean"
    ]
    return markdown(["order", "KL", "search", "plan"], lines)


def filled(text: str) -> str:
    """The README with its tables renewed."""
    for name, table in (("speed", speed_table()), ("healing", healing_table()), ("orders", orders_table())):
        text = re.sub(f"(<!-- {name} -->\n).*?(<!-- /{name} -->)", rf"\g<1>{table}\n\g<2>", text, flags=re.DOTALL)
    return text


if __name__ == "__main__":
    README.write_text(filled(README.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"renewed the tables of {README}")
