"""Lists to look things up in: names with codes, and Python functions that return constants."""

from __future__ import annotations

from itertools import product
from random import Random

from hf_kvcache.evaluation.needles import digits
from hf_kvcache.evaluation.task import Task
from hf_kvcache.evaluation.words import ADJECTIVES, NOUNS

ASKED = 8
MOST_ROWS = len(ADJECTIVES) * len(NOUNS)


def key_values(seed: int, rows: int, asked: int = ASKED) -> Task:
    """A list of two-word names with codes of four digits.

    Args:
        seed: of names, codes and which of them are asked for.
        rows: of the list; with more rows come the same first ones.
        asked: how many rows are asked for, at most.
    """
    table, chosen = _table(seed, rows, asked)
    listed = "".join(f"{name}: {code}\n" for name, code in table.items())
    context = f"Below is a list of names and their codes.\n\n{listed}\nNow look up the codes again.\n"
    return Task(f"kv-{rows}", context, tuple((f"\n{name}:", f" {table[name]}") for name in chosen))


def functions(seed: int, rows: int, asked: int = ASKED) -> Task:
    """A Python module of functions that return a constant, and the test that is being written for it.

    The arguments are those of `key_values`.
    """
    table, chosen = _table(seed, rows, asked)
    defined = "".join(
        f'def get_{_joined(name)}():\n    """Return the configured {name}."""\n    return {code}\n\n'
        for name, code in table.items()
    )
    context = f"# settings.py\n{defined}# test_settings.py\nfrom settings import *\n\ndef test_all():"
    questions = tuple((f"\n    assert get_{_joined(name)}() ==", f" {table[name]}") for name in chosen)
    return Task(f"func-{rows}", context, questions)


def _table(seed: int, rows: int, asked: int) -> tuple[dict[str, str], list[str]]:
    """Names with their codes, and the names asked for."""
    names = [f"{adjective} {noun}" for adjective, noun in product(ADJECTIVES, NOUNS)]
    if not 1 <= rows <= MOST_ROWS:
        raise ValueError(f"rows must be from 1 to {MOST_ROWS}, got {rows}")
    if asked < 1:
        raise ValueError(f"asked must be at least 1, got {asked}")
    random = Random(seed)
    random.shuffle(names)
    table = {name: digits(random, 4) for name in names[:rows]}
    return table, random.sample(list(table), min(asked, rows))


def _joined(name: str) -> str:
    return name.replace(" ", "_")
