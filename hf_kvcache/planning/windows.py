"""What a plan is measured on: contexts cut from the user's text, and what is asked of each.

Two things are asked, and both count. How the text goes on says what the next tokens need, which is mostly recent. A
passage quoted word for word says what any later question may need, wherever it stands; a plan that is good at the first
alone throws away what nobody has asked for yet.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_kvcache.calibration.texts import Calibration, token_windows
from hf_kvcache.devices import input_device
from hf_kvcache.evaluation.filler import token_ids

QUOTED, LEAD = 112, 16
BREAK = "\n\n"


@dataclass(frozen=True)
class Question:
    """Tokens that follow a context.

    Args:
        ids: `[1, T]`.
        first: of the predictions that count; those before it only show what is being asked.
    """

    ids: Tensor
    first: int


@dataclass(frozen=True)
class Window:
    """One context and what is asked of it.

    Args:
        context: `[1, P]`, what is compressed.
        questions: the continuation, and a quotation.
    """

    context: Tensor
    questions: tuple[Question, ...]


def windows(
    model: Any, tokenizer: Any, texts: Calibration, count: int, length: int, following: int, seed: int = 0
) -> list[Window]:
    """Cuts windows, spread evenly over the texts.

    Args:
        model, tokenizer: whose tokens they are.
        texts: see `token_windows`; None for the shipped sample.
        count: how many.
        length: tokens of each context.
        following: tokens of the continuation.
        seed: of where the quotations begin.
    """
    ids = token_windows(texts, model, tokenizer, count, length + following)
    ids = ids.to(input_device(model))
    break_ = torch.tensor([token_ids(tokenizer, BREAK)], device=ids.device)
    return [_window(row[None], length, break_, start) for row, start in zip(ids, _starts(count, length, seed))]


def _window(ids: Tensor, length: int, break_: Tensor, start: int) -> Window:
    quoted = torch.cat([break_, ids[:, start : start + QUOTED]], dim=1)
    questions = (Question(ids[:, length:], 0), Question(quoted, break_.shape[1] + LEAD))
    return Window(ids[:, :length], questions)


def _starts(count: int, length: int, seed: int) -> Iterator[int]:
    """Where quotations begin: one in each of `count` equal parts of a context, in mixed order."""
    if length < 2 * QUOTED:
        raise ValueError(f"length must be at least {2 * QUOTED} tokens to quote from, got {length}")
    generator = torch.Generator().manual_seed(seed)
    room = length - QUOTED
    for part in torch.randperm(count, generator=generator).tolist():
        yield int((part + float(torch.rand(1, generator=generator))) / count * room)
