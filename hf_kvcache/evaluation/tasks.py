"""`make_task`: every kind of task by its name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hf_kvcache.evaluation.filler import largest_that_fits
from hf_kvcache.evaluation.lookup import MOST_ROWS, functions, key_values
from hf_kvcache.evaluation.needles import niah, passkey, tracking
from hf_kvcache.evaluation.task import Task

# tasks of any length: filler fills what is left
IN_FILLER: dict[str, Callable[..., Task]] = {"niah": niah, "tracking": tracking}
# tasks whose length is their number of rows
IN_ROWS: dict[str, Callable[..., Task]] = {"kv": key_values, "func": functions}


def make_task(name: str, tokenizer: Any, seed: int, length: int | None = None, filler: str | None = None) -> Task:
    """Makes one task.

    Args:
        name: `niah-1`, `niah-4`, ... (needles); `tracking-1` (hops); `passkey`; `kv-20`, `func-50`, ... (rows), or `kv`
            and `func` with as many rows as fit into `length`.
        tokenizer: counts the tokens of the context.
        seed: equal seeds make equal tasks.
        length: tokens of the context at most. `kv-20` and the like have the length of their rows and take none.
        filler: prose around needles and assignments; None for the shipped text.

    Example:
        >>> make_task("niah-4", tokenizer, seed=0, length=1024).questions[0]
    """
    kind, _, size = name.partition("-")
    known = kind in IN_FILLER or kind in IN_ROWS or name == "passkey"
    if not known or (size and not size.isdecimal()) or (kind in IN_FILLER and not size):
        raise ValueError(
            f"unknown task {name!r}; expected niah-N, tracking-N, passkey, kv, kv-N, func or func-N with a number N"
        )
    if kind in IN_ROWS and size:
        if length is not None:
            raise ValueError(f"{name!r} has the length of its {size} rows; use {kind!r} with length={length}")
        return IN_ROWS[kind](seed, int(size))
    if length is None:
        raise ValueError(f"{name!r} needs length, the tokens of its context")
    if kind in IN_ROWS:
        return largest_that_fits(tokenizer, length, lambda more: IN_ROWS[kind](seed, 1 + more), MOST_ROWS - 1)
    if name == "passkey":
        return passkey(tokenizer, length, seed)
    return IN_FILLER[kind](tokenizer, length, seed, int(size), filler)
