"""The main job: a small real model, a long real text, every method, one table, one plot.

A method joins with one line in `ROWS`.
"""

from __future__ import annotations

import csv
import math
from dataclasses import astuple, dataclass, fields, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hf_kvcache import smollm2
from hf_kvcache.api import find_plans, patch_model, unpatch_model
from hf_kvcache.measure import Continuation, continuation, kl_divergence, speed, top1_agreement
from hf_kvcache.methods import KVSharer
from hf_kvcache.sharing import SharingPlan

GENERATED = 48
SHARES = (0.125, 0.25)


@dataclass(frozen=True)
class Row:
    """One line of the table, named as its columns."""

    method: str
    kv_bytes: int
    times_smaller: float
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    kl: float
    top1: float
    perplexity: float


def run_demo(output: Path, prompt: int, scored: int, steps: int, console: Console) -> list[Row]:
    """Measures every method and writes `demo.csv` and `demo.png` into `output`; plans found are kept there too."""
    output.mkdir(parents=True, exist_ok=True)
    with console.status("loading SmolLM2-135M-Instruct in float32"):
        model, tokenizer = smollm2.load()
    text = (files("hf_kvcache") / "data" / "demo.txt").read_text(encoding="utf-8")
    ids = tokenizer(text, return_tensors="pt")["input_ids"][:, : prompt + scored]
    if ids.shape[1] < prompt + scored:
        raise ValueError(f"the demo text has {ids.shape[1]} tokens, expected {prompt + scored}; ask for fewer")
    full = continuation(model, ids, prompt)
    rows, texts = [], {}
    for name, method, options in method_rows(model, tokenizer, output, console):
        with console.status(f"measuring {name}"):
            if method != "unpatched":
                patch_model(model, method, **options)
            rows.append(measure(model, name, ids, prompt, steps, full))
            texts[name] = generate(model, tokenizer, ids[:, :prompt])
            unpatch_model(model)
        console.print(f"measured {name}")
    print_table(rows, console)
    for name, generated in texts.items():
        # as text: what a model says may look like markup
        console.print(Text(name, style="bold"), Text(f"goes on: {generated!r}"))
    write_csv(rows, output / "demo.csv")
    plot(rows, output / "demo.png")
    console.print(f"wrote {output / 'demo.csv'} and {output / 'demo.png'}")
    return rows


def method_rows(
    model: Any, tokenizer: Any, output: Path, console: Console
) -> list[tuple[str, str | None, dict[str, Any]]]:
    """The lines of the table: name, method and its options. A later method adds its line here."""
    rows: list[tuple[str, str | None, dict[str, Any]]] = [
        ("transformers", "unpatched", {}),
        ("none", None, {}),
    ]
    paths = {share: output / f"kvsharer-{share}.safetensors" for share in SHARES}
    missing = [share for share, path in paths.items() if not path.exists()]
    if missing:
        console.print(f"calibrating kvsharer at {missing}: about six minutes on two cores, kept in {output}")
        methods = [KVSharer(share=share) for share in missing]
        for share, plan in zip(missing, find_plans(model, methods, tokenizer=tokenizer), strict=True):
            plan.save(paths[share])
    for share, path in paths.items():
        healed = SharingPlan.load(path)
        rows.append((f"kvsharer {share:.1%}", "kvsharer", {"plan": replace(healed, healed={})}))
        rows.append((f"kvsharer {share:.1%} healed", "kvsharer", {"plan": healed}))
    quarter = {"budget": 0.25, "tokenizer": tokenizer}
    rows.append(("adakv+criticalkv 25%", "adakv+criticalkv", quarter))
    rows.append(("kvzip 25%", "kvzip", quarter))
    rows.append(("turboquant 4 bits", "turboquant", {"bits": 4}))
    rows.append(("kvzip 25% + 4 bits", "kvzip+turboquant", {**quarter, "bits": 4}))
    return rows


def measure(model: Any, name: str, ids: Any, prompt: int, steps: int, full: Continuation) -> Row:
    """Fidelity and speed of the model as it is now."""
    own = continuation(model, ids, prompt)
    timed = speed(model, ids[:, :prompt], steps)
    return Row(
        name,
        own.kv_bytes,
        full.kv_bytes / own.kv_bytes,
        prompt / timed.prefill,
        1 / timed.decode,
        kl_divergence(full, own),
        top1_agreement(full, own),
        math.exp(own.loss),
    )


def generate(model: Any, tokenizer: Any, ids: Any) -> str:
    """The greedy continuation of the prompt."""
    out = model.generate(ids, max_new_tokens=GENERATED, do_sample=False, pad_token_id=0)
    return tokenizer.decode(out[0, ids.shape[1] :])


def print_table(rows: list[Row], console: Console) -> None:
    """Prints the rows."""
    table = Table("method", "KV MB", "smaller", "prefill/s", "decode/s", "KL", "top-1", "ppl", box=None)
    for column in table.columns:
        column.no_wrap = True
    for row in rows:
        table.add_row(
            row.method,
            f"{row.kv_bytes / 1e6:.1f}",
            f"{row.times_smaller:.2f}x",
            f"{row.prefill_tokens_per_s:.0f}",
            f"{row.decode_tokens_per_s:.1f}",
            f"{max(row.kl, 0):.3f}",
            f"{row.top1:.2f}",
            f"{row.perplexity:.1f}",
        )
    console.print(table)


def write_csv(rows: list[Row], path: Path) -> None:
    """Writes the rows with their column names."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([field.name for field in fields(Row)])
        writer.writerows(astuple(row) for row in rows)


def plot(rows: list[Row], path: Path) -> None:
    """Draws divergence and decode speed against the bytes held."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    sizes = [row.kv_bytes / 1e6 for row in rows]
    panels = (
        ("KL(full || method), nats a token", [row.kl for row in rows]),
        ("decode, tokens a second", [row.decode_tokens_per_s for row in rows]),
    )
    for axis, (label, values) in zip(axes, panels, strict=True):
        for row, size, value in zip(rows, sizes, values, strict=True):
            axis.scatter(size, value, s=60, label=row.method)
        axis.set(xlabel="KV cache after the prompt, MB", ylabel=label)
        axis.margins(0.12)
        axis.grid(alpha=0.3)
    axes[0].set_yscale("symlog", linthresh=0.01)
    axes[1].set_ylim(bottom=0)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle("SmolLM2-135M-Instruct, float32, CPU")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
