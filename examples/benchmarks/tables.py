"""Writes the tables of the README from the committed results, so that its figures are those of the CSV files.

python examples/benchmarks/tables.py
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

from common import RESULTS
from common import read_results as rows

# the texts that every library was run on
DOCUMENTS = ("topics", "play")
LIBRARIES = {"ours": "hf_kvcache", "kvpress": "kvpress 0.5.5", "transformers": "transformers"}
PEER_FIGURES = {
    "bytes_share": "{:.3f}",
    "bytes_share_after_steps": "{:.3f}",
    "natural_kl": "{:.4f}",
    "recall_nll": "{:.2f}",
    "needle_accuracy": "{:.2f}",
}
README = Path(__file__).parents[2] / "README.md"


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


def eviction_table() -> str:
    """Bytes, cost, speed and peak memory of eviction at 4k context."""
    peaks = {row["method"]: float(row["peak_mb"]) for row in rows("eviction_peak_4096")}
    lines = [
        [
            row["method"],
            f"{float(row['kv_bytes_of_default']):.3f}",
            f"{float(row['prefill_overhead']):+.1%}",
            f"{float(row['prefill_speedup']):.2f}",
            f"{float(row['decode_speedup']):.2f}",
            f"{peaks[row['method']]:.0f} MB",
        ]
        for row in rows("eviction_speed_4096")
    ]
    header = ["method", "KV bytes", "added to the prefill", "prefill speed", "decode speed"]
    return markdown([*header, f"peak memory of the prefill (default: {peaks['default']:.0f} MB)"], lines)


def decode_table() -> str:
    """Decode speed by context and method, of eviction and of codes."""
    found: dict[str, dict[int, str]] = {}
    for name in ("eviction_speed_2048", "eviction_speed_4096", "eviction_speed_8192", "turboquant_speed"):
        for row in rows(name):
            if row["method"] != "none" or name != "turboquant_speed":
                found.setdefault(row["method"], {})[int(row["context"])] = f"{float(row['decode_speedup']):.2f}"
    lengths = sorted({length for row in found.values() for length in row})
    lines = [[method, *(own.get(length, "-") for length in lengths)] for method, own in found.items()]
    return markdown(["method", *(f"{length:,d} tokens" for length in lengths)], lines)


def retrieval_table() -> str:
    """What codes lose on retrieval, all tasks together."""
    lines = [
        [
            row["setting"],
            row["answers"],
            f"{float(row['full_accuracy']):.3f}",
            f"{-100 * float(row['accuracy_lost']):+.1f} ({-100 * float(row['accuracy_lost_high']):+.1f} to "
            f"{-100 * float(row['accuracy_lost_low']):+.1f})",
            f"{float(row['nll_added']):+.3f} ({float(row['nll_added_low']):+.3f} to "
            f"{float(row['nll_added_high']):+.3f})",
        ]
        for row in rows("turboquant_tasks")
        if row["task"] == "all, by accuracy"
    ]
    return markdown(["codes", "answers", "accuracy, full cache", "change in points", "change of the NLL"], lines)


def peers_table() -> str:
    """Ours, kvpress and transformers by one protocol: the mean over the documents that all were run on."""
    grouped: dict[tuple[str, str, str], list[dict[str, str]]] = {}
    for row in rows("peers"):
        if row["document"] in DOCUMENTS and not row["error"]:
            method = re.sub(r"\{.*", "", row["method"])
            grouped.setdefault((row["kept"] or "1", method, row["backend"]), []).append(row)
    lines = []
    for (kept, method, backend), found in sorted(grouped.items(), reverse=True):
        if len(found) == len(DOCUMENTS):
            figures = [sum(float(row[key]) for row in found) / len(found) for key in PEER_FIGURES]
            shown = [form.format(figure) for form, figure in zip(PEER_FIGURES.values(), figures, strict=True)]
            lines.append([method, LIBRARIES[backend], f"{float(kept):.0%}", *shown])
    header = ["method", "library", "tokens kept", "bytes after the prefill", "after two steps"]
    return markdown([*header, "KL", "recall", "needles"], lines)


def quantisation_table() -> str:
    """Mean over five domains of KL and loss by method."""
    lines = [
        [
            row["method"],
            f"{float(row['kv_bytes_of_full']):.3f}",
            f"{float(row['kl']):.4f}",
            f"{float(row['loss_increase']):+.3f}",
            f"{float(row['top1']):.1%}",
        ]
        for row in rows("turboquant_fidelity")
        if row["domain"] == "mean"
    ]
    return markdown(["method", "KV bytes", "KL", "loss", "same top token"], lines)


def yoco_prefill_table() -> str:
    """Speed of prefill, and in brackets of peak memory, against the Transformer, by length."""
    found = {(row["model"], int(row["length"])): row for row in rows("yoco_prefill")}
    lengths = sorted({length for _, length in found})
    lines = []
    for model in ("yoco-retention", "yoco-window", "yoco-half"):
        some = [found[model, length] for length in lengths]
        shown = [f"{float(row['speedup']):.2f} ({float(row['peak_ratio']):.2f})" for row in some]
        lines.append(
            [model, *shown, f"{float(some[-1]['kv_bytes']) / float(found['transformer', lengths[-1]]['kv_bytes']):.3f}"]
        )
    return markdown(["model", *(f"{length:,d} tokens" for length in lengths), "KV bytes at the last"], lines)


def yoco_scratch_table() -> str:
    """Validation loss and associative recall of small models trained alike."""
    found = rows("yoco_from_scratch")
    lines = []
    for row in found:
        if row["task"] == "text":
            recall = [other for other in found if other["task"] == "recall" and other["model"] == row["model"]]
            lines.append(
                [
                    row["model"],
                    f"{int(row['parameters']):,d}",
                    f"{row['loss']} ({row['loss_low']} to {row['loss_high']})",
                    f"{row['difference']} ({row['difference_low']} to {row['difference_high']})",
                    row["difference_by_seed"],
                    _recall(recall),
                ]
            )
    control = [row for row in found if row["model"] == "window-only"]
    lines.append(["windows in all layers (control)", "", "", "", "", _recall(control)])
    return markdown(
        ["model", "parameters", "validation loss", "less the Transformer's", "by seed", "recall, by seed (steps)"],
        lines,
    )


def _recall(found: list[dict[str, str]]) -> str:
    return ", ".join(f"{float(row['accuracy']):.1%} ({row['steps']})" for row in found)


def yoco_conversion_table() -> str:
    """SmolLM2 turned into YOCO, by the layers that keep their KV and the training tokens, next to KVSharer."""
    found = sorted(rows("yoco_conversion"), key=lambda row: (-int(row["split"]), int(row["tokens"]), float(row["kl"])))
    lines = []
    for row in found:
        name = {"untouched": "untouched", "kvsharer": "KVSharer, healed"}.get(row["arm"], f'`init="{row["arm"]}"`')
        lines.append(
            [
                f"{row['split']} of 30",
                name,
                f"{int(row['tokens']):,d}",
                f"{float(row['kv_bytes_of_full']):.3f}",
                f"{float(row['kl']):.3f}",
                f"{float(row['loss_increase']):+.3f}",
                f"{float(row['top1']):.2f}",
                *(f"{float(row[f'{task} accuracy']):.2f} ({float(row[f'{task} nll']):.2f})" for task in RETRIEVAL),
            ]
        )
    header = ["keep KV", "model", "training tokens", "KV bytes", "KL", "loss", "same top token"]
    return markdown([*header, "needle (NLL)", "20 pairs (NLL)"], lines)


RETRIEVAL = ("niah-1", "kv-20")


def restore_table() -> str:
    """Time to the first token with a prefix in the store: how many times as fast as prefill, by length."""
    found = {(row["way"], int(row["prefix"])): row for row in rows("sequential_restore")}
    lengths = sorted({length for _, length in found})
    names = {"raw": "`load_cache` of one file", "lossless": "pages, `lossless`", "residual": "pages, `residual`"}
    lines = [
        [name, *(f"{float(found[way, length]['speedup']):.1f}" for length in lengths)] for way, name in names.items()
    ]
    prefill = [f"{float(found['prefill', length]['seconds']):.1f} s" for length in lengths]
    return markdown(["", *(f"{length:,d} tokens" for length in lengths)], [["prefill", *prefill], *lines])


def pareto_figure() -> str:
    """The plot of `pareto.py`, where it was drawn."""
    drawn = (RESULTS / "pareto.png").exists()
    return "![KL against bytes, by method](examples/benchmarks/results/pareto.png)" if drawn else ""


def plans_table(model: str) -> str:
    """Measured plans beside single methods of all libraries, by the ratio asked for: means over the documents."""
    found: dict[tuple[int, str, str], list[dict[str, str]]] = {}
    for row in rows("plans"):
        if row["model"] == model and not row["error"]:
            options = json.loads(re.sub(r"^[^{]*", "", row["method"]) or "{}")
            method = row["method"].split("{")[0]
            if method == "planned":
                ratio, method = int(options["plan"].split("-")[-1].split(".")[0]), "**measured plan**"
            elif method == "auto":
                ratio, method = int(options["target_ratio"]), "`target_ratio`, not measured"
            elif row["kept"]:
                ratio, method = round(1 / float(row["kept"])), f"{method}, keeps {float(row['kept']):.1%}"
            else:
                ratio = min(RATIOS, key=lambda ratio: abs(math.log(_smaller(row) / ratio)))
                method += "".join(f" {name[0]}{bits}" for name, bits in options.items())
            found.setdefault((ratio, method, row["backend"]), []).append(row)
    # the documents that all of them were run on
    documents = set.intersection(*({row["document"] for row in some} for some in found.values()))
    lines: list[tuple[int, float, list[str]]] = []
    for (ratio, method, backend), some in found.items():
        some = [row for row in some if row["document"] in documents]
        smaller, kl, recall, accuracy, nll = (
            sum(figure(row) for row in some) / len(some) for figure in (_smaller, *map(_figure, PLAN_FIGURES))
        )
        held = f"{smaller:.2f}" if smaller > ratio / 2 else f"{smaller:.2f}: keeps everything and masks"
        shown = [f"{kl:.4f}", f"{recall:.2f}", f"{accuracy:.2f}", f"{nll:.2f}"]
        lines.append((ratio, kl, [str(ratio), method, LIBRARIES[backend], held, *shown]))
    header = ["asked", "method", "library", "times smaller", "KL", "recall", "needles", "their NLL"]
    return markdown(header, [line for _, _, line in sorted(lines, key=lambda line: line[:2])])


RATIOS = (4, 8, 16)
PLAN_FIGURES = ("natural_kl", "recall_nll", "needle_accuracy", "needle_nll")


def _figure(name: str) -> Callable[[dict[str, str]], float]:
    return lambda row: float(row[name])


def _smaller(row: dict[str, str]) -> float:
    """Of the two times at which bytes are counted the better one: kvpress holds views of the dense prefill at first."""
    return max(float(row["times_smaller_than_16_bit"]), float(row["times_smaller_after_steps"]))


MODELS = {"smollm2": "SmolLM2-135M", "qwen-coder": "Qwen2.5-Coder-0.5B"}
TUNING = ("measuring", "pricing_pairs", "verifying")


def tuning_table() -> str:
    """What making the plans took, and what they lose on the windows held back."""
    lines = [
        [
            MODELS[row["model"]],
            row["ratio"],
            f"{float(row['times_smaller_than_16_bit']):.2f}",
            f"{float(row['kl_continuation']):.4f}",
            f"{float(row['kl_quotation']):.4f}",
            " + ".join(f"{float(taken):.0f}" for part in TUNING if (taken := row[f"{part}_processor_seconds"])) + " s",
        ]
        for row in rows("plans_tuning")
    ]
    header = ["model", "asked", "times smaller", "KL", "KL of a quotation", "processor time"]
    return markdown(header, lines)


TABLES = {
    "pareto": pareto_figure,
    "speed": speed_table,
    "healing": healing_table,
    "orders": orders_table,
    "eviction": eviction_table,
    "decode": decode_table,
    "peers": peers_table,
    "quantisation": quantisation_table,
    "retrieval": retrieval_table,
    "yoco_prefill": yoco_prefill_table,
    "yoco_from_scratch": yoco_scratch_table,
    "yoco_conversion": yoco_conversion_table,
    "restore": restore_table,
    "plans": partial(plans_table, "smollm2"),
    "plans_qwen": partial(plans_table, "qwen-coder"),
    "tuning": tuning_table,
}


def filled(text: str) -> str:
    """The README with its tables renewed."""
    for name, table in TABLES.items():
        marked = f"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        text = re.sub(marked, lambda found, table=table: f"{found[1]}{table()}\n{found[2]}", text, flags=re.DOTALL)
    return text


if __name__ == "__main__":
    README.write_text(filled(README.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"renewed the tables of {README}")
