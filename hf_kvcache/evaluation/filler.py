"""Filler: sentences of prose that hide what a task asks for, cut to a length in tokens."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from importlib.resources import files
from random import Random
from typing import Any

from hf_kvcache.evaluation.task import Task

SHORTEST, LONGEST = 20, 400


def shipped_prose() -> str:
    """The text of the demo, an encyclopedia article: about 7,500 tokens that nothing is calibrated on."""
    return (files("hf_kvcache") / "data" / "demo.txt").read_text(encoding="utf-8")


def sentences(text: str) -> list[str]:
    """The sentences of a text, without line breaks; fragments and endless ones are left out."""
    found = re.split(r"(?<=[.!?])\s+", " ".join(text.split()))
    return [sentence for sentence in found if SHORTEST <= len(sentence) <= LONGEST]


def drawn_sentences(random: Random, filler: str | None) -> Sequence[str]:
    """The sentences of `filler` (None: `shipped_prose`) in their order, from a random one on and round."""
    found = sentences(shipped_prose() if filler is None else filler)
    if not found:
        raise ValueError(f"filler must be prose with whole sentences, got {filler!r:.60}")
    start = random.randrange(len(found))
    return found[start:] + found[:start]


def largest_that_fits(tokenizer: Any, length: int, build: Callable[[int], Task], most: float = math.inf) -> Task:
    """The last of the tasks `build(0)`, `build(1)`, ... whose context has at most `length` tokens.

    Args:
        tokenizer: counts the tokens.
        length: tokens allowed.
        build: makes the task with so many units of filler, or of rows; every unit makes its context longer.
        most: units that it can be made with.
    """

    def size(units: int) -> int:
        return len(token_ids(tokenizer, build(units).context))

    smallest = size(0)
    if smallest > length:
        raise ValueError(
            f"length must be at least {smallest}, the tokens of the smallest {build(0).name!r}, got {length}"
        )
    fits, too_many = 0, 1
    while too_many <= most and size(too_many) <= length:
        fits, too_many = too_many, 2 * too_many
    if too_many > most:
        too_many = int(most)
        longest = size(too_many)
        if longest == length:
            return build(too_many)
        if longest < length:
            raise ValueError(
                f"length must be at most {longest}, the tokens of the longest {build(too_many).name!r}, got {length}"
            )
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        if size(middle) <= length:
            fits = middle
        else:
            too_many = middle
    return build(fits)


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """The token ids of raw text, without special tokens."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
