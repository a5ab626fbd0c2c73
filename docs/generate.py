"""Writes a page for every method, all of one form, from the docstrings and the committed results.

python docs/generate.py [FOLDER]
"""

from __future__ import annotations

import csv
import inspect
import re
import shutil
import sys
from pathlib import Path

from hf_kvcache import METHODS
from hf_kvcache.described import options_of

HERE = Path(__file__).parent
RESULTS = HERE.parent / "examples" / "benchmarks" / "results"
# of a method: what it does to the bytes, by the slot that it fills
BYTES = {
    "scorer": "A share `budget` of the tokens is kept, {spread}; 4 bytes an entry say which.",
    "allocator": "The sum is that of `budget`; heads differ, and nothing is padded.",
    "selector": "The counts are its host's; it changes which tokens, not how many.",
    "sharing": "Of L layers C hold nothing: 1 - C / L of the bytes.",
    "codec": "Codes of the bits asked, a scale an entry and what the codec keeps a head.",
    "store": "The same bytes, in another place.",
    "prefix": "The cache that attention reads stays as large as it is; stored prompts are in another place.",
}
# of those whose options say nothing of a budget or of bits
OWN = {
    "auto": "Those of `target_ratio`, counted in 16 bits: a share of the tokens and one width for all layers.",
    "planned": "Those that the plan was solved for: shares, widths and readers of every layer are in its file.",
}


def page(name: str) -> str:
    """The page of a method in Markdown."""
    method = METHODS[name]
    module = inspect.getmodule(method)
    assert module is not None and module.__doc__ is not None
    title, _, idea = module.__doc__.strip().partition("\n")
    rows = measured(name)
    return "\n".join(
        [
            f"# {name}",
            "",
            plain(title),
            "",
            "## Idea and formula",
            "",
            plain(idea.strip()) or "See the file.",
            "",
            "## Options",
            "",
            options(method),
            "",
            "## Bytes",
            "",
            bytes_of(name),
            "",
            "## Measured",
            "",
            rows or "See the tables of the README and `examples/benchmarks/results`.",
            "",
            "## Paper and file",
            "",
            f"{link(method.paper)}; slot `{method.slot}`; `hf_kvcache/{module.__name__.replace('.', '/')[11:]}.py`",
            "",
        ]
    )


def bytes_of(name: str) -> str:
    """What a method does to the bytes."""
    if name in OWN:
        return OWN[name]
    method = METHODS[name]
    spread = (
        "over all layers and heads together"
        if method.slot == "scorer" and method().host.name == "global"
        else "in every layer"
    )
    return " ".join(text for slot, text in BYTES.items() if slot in method.slot).format(spread=spread)


def plain(text: str) -> str:
    """A docstring as Markdown: indented formulas are code, and nothing in it is a tag."""
    lines = [line if line.startswith("    ") else line.replace("<", "&lt;") for line in text.splitlines()]
    # a list or a formula begins after an empty line in Markdown
    spaced: list[str] = []
    for line in lines:
        begins = re.match(r"(- |\d+\. |    )", line) is not None
        within = bool(spaced) and (re.match(r"(- |\d+\. | )", spaced[-1]) is not None or not spaced[-1])
        spaced += ["", line] if begins and spaced and not within else [line]
    return "\n".join(spaced)


def options(method: type) -> str:
    """A row an option: its default, and what the docstrings of the class and its bases say of it."""
    lines = ["| option | default | meaning |", "|---|---|---|"]
    for option in options_of(method):
        meaning = option.meaning.replace("|", "\\|").replace("<", "&lt;")
        lines.append(f"| `{option.name}` | {f'`{option.default}`' if option.default else ''} | {meaning} |")
    return "\n".join(lines) if len(lines) > 2 else "None."


def measured(name: str) -> str:
    """The rows of the committed comparison that are of this method alone."""
    path = RESULTS / "peers.csv"
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if re.sub(r"\{.*", "", row["method"]) == name and not row["error"]]
    if not rows:
        return ""
    lines = ["| library | text | kept | bytes | KL | recall | needles |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        figures = (row["bytes_share"], row["natural_kl"], row["recall_nll"], row["needle_accuracy"])
        lines.append(f"| {row['library']} | {row['document']} | {row['kept'] or '1'} | {' | '.join(figures)} |")
    return "SmolLM2-135M, prefix of 2,048 tokens (`examples/benchmarks/peers.py`):\n\n" + "\n".join(lines)


def link(paper: str) -> str:
    """`arXiv 2404.14469` as a link."""
    number = re.search(r"\d{4}\.\d{5}", paper)
    return f"[{paper}](https://arxiv.org/abs/{number[0]})" if number else "No paper"


def write(folder: Path) -> None:
    """Fills a folder with all pages: those written by hand, and one for every method."""
    (folder / "methods").mkdir(parents=True, exist_ok=True)
    for path in HERE.glob("*.md"):
        shutil.copy(path, folder / path.name)
    lines = ["# Methods", "", "| method | slot | paper |", "|---|---|---|"]
    for name, method in METHODS.items():
        (folder / "methods" / f"{name}.md").write_text(page(name), encoding="utf-8")
        lines.append(f"| [{name}]({name}.md) | {method.slot} | {link(method.paper)} |")
    (folder / "methods" / "index.md").write_text("\n".join([*lines, ""]), encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1] if len(sys.argv) > 1 else HERE.parent / "build" / "docs"))
