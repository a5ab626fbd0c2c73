"""The documents of our lm-eval tasks, made on the spot: nothing is downloaded, and equal seeds make equal documents."""

from __future__ import annotations

import math
import re
from typing import Any

from datasets import Dataset, DatasetDict

from hf_kvcache.evaluation.filler import shipped_prose
from hf_kvcache.evaluation.tasks import make_task

# of a text that goes on: characters of each context and of what follows it
CONTEXT, FOLLOWING = 4000, 600


class Words:
    """Counts words and marks in the place of a model's tokens, so that all models get the same documents."""

    def __call__(self, text: str, add_special_tokens: bool = False) -> dict[str, list[str]]:
        return {"input_ids": re.findall(r"\w+|[^\w\s]", text)}


def questions(task: str, contexts: int, length: int | None = None, agnostic: bool = True, **_: Any) -> DatasetDict:
    """One document for each question of so many contexts.

    Args:
        task: for `make_task`.
        contexts: how many; seeds count from 0.
        length: words of each context.
        agnostic: whether the question is asked after the compression.
    """
    rows = []
    for seed in range(contexts):
        made = make_task(task, Words(), seed, length)
        for question, answer in made.questions:
            prompt = made.context + question
            rows.append({"prompt": prompt, "answer": answer, "asked": question if agnostic else ""})
    return DatasetDict({"test": Dataset.from_list(rows)})


def continuations(contexts: int, **_: Any) -> DatasetDict:
    """Pieces of the shipped prose, and how they go on."""
    text = shipped_prose()
    step = (len(text) - CONTEXT - FOLLOWING) // max(contexts - 1, 1)
    rows = []
    for index in range(contexts):
        # at the end of a word
        cut = text.index(" ", index * step + CONTEXT)
        rows.append({"prompt": text[index * step : cut], "answer": text[cut : cut + FOLLOWING], "asked": ""})
    return DatasetDict({"test": Dataset.from_list(rows)})


def passages(contexts: int, **_: Any) -> DatasetDict:
    """Pieces of the shipped prose, to be read from beginning to end."""
    text = shipped_prose()
    pieces = [text[start : start + CONTEXT] for start in range(0, len(text) - CONTEXT, len(text) // contexts)]
    return DatasetDict({"test": Dataset.from_list([{"prompt": "", "answer": piece, "asked": ""} for piece in pieces])})


def scores(doc: dict[str, str], results: list[tuple[float, bool]]) -> dict[str, float]:
    """Whether the answer was the most likely text, and its negative log-likelihood in nats."""
    ((likelihood, greedy),) = results
    return {"acc": float(greedy), "nll": -likelihood}


def bits(doc: dict[str, str], results: list[Any]) -> dict[str, float]:
    """Bits a byte of a text that goes on; comparable between tokenizers."""
    found = results[0][0] if isinstance(results[0], tuple) else results[0]
    return {"bits_per_byte": -found / math.log(2) / len(doc["answer"].encode())}


def generated(doc: dict[str, str], results: list[str]) -> dict[str, float]:
    """Whether the number was generated."""
    return {"acc": float(doc["answer"].strip() in results[0])}
