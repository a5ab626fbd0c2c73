"""Log-likelihoods of texts through a compressed cache, in batches, every context read once.

A text is a context, which is prefilled and compressed, and what follows it, which is scored against what is left. Texts
with one context share its prefill and its sealed cache.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_kvcache.api import new_cache
from hf_kvcache.devices import input_device

# rows that follow one batch of contexts are fed together up to here: what is sealed is shared, so they cost little
ROWS_AT_ONCE = 8
# tokens whose probabilities are computed at once: with 128k words, all of a long text's would take gigabytes
SLICE = 1024


@dataclass(frozen=True)
class ScoredText:
    """Token ids of a text.

    Args:
        ids: at least two.
        context: how many of them are the context; 0 to score without a cache, otherwise less than all but the last.
        first: the first token that is scored, at least 1. Tokens up to `context`, itself included, are predicted by the
            prefill, before anything is compressed.
    """

    ids: tuple[int, ...]
    context: int
    first: int

    def __post_init__(self):
        if not (0 <= self.context < max(len(self.ids) - 1, 1) and 1 <= self.first < len(self.ids)):
            raise ValueError(
                f"expected context < {len(self.ids) - 1} and 1 <= first < {len(self.ids)}, the tokens of the text, got "
                f"context={self.context} and first={self.first}"
            )


@torch.no_grad()
def score_texts(
    model: Any, texts: Sequence[ScoredText], batch_size: int = 1, done: Callable[[int], None] = lambda count: None
) -> list[tuple[float, bool]]:
    """Scores texts.

    Args:
        model: patched.
        texts: in any order.
        batch_size: contexts that are prefilled together.
        done: called with the number of texts finished.

    Returns:
        For every text the sum of the log-probabilities of its scored tokens, and whether each of them was the most
        likely one.
    """
    results: list[tuple[float, bool]] = [(0.0, False)] * len(texts)
    by_context: dict[tuple[int, ...], list[int]] = {}
    for index, text in enumerate(texts):
        by_context.setdefault(text.ids[: text.context], []).append(index)
    alone = by_context.pop((), [])
    # the longest first: what does not fit into memory fails at once
    contexts = sorted(by_context, key=lambda context: (-len(context), context))
    for start in range(0, len(contexts), batch_size):
        batch = contexts[start : start + batch_size]
        cache, early, mask = _prefill(
            model, batch, [[texts[index] for index in by_context[context]] for context in batch]
        )
        rows = [(row, index) for row, context in enumerate(batch) for index in by_context[context]]
        limit = max(batch_size, ROWS_AT_ONCE)
        for begin in range(0, len(rows), limit):
            part = rows[begin : begin + limit]
            owned = len(rows) <= limit
            found = _follow(model, cache if owned else copy.deepcopy(cache), mask, part, texts)
            for (row, index), late in zip(part, found, strict=True):
                results[index] = _judge(texts[index], early[row], late)
            done(len(part))
    alone.sort(key=lambda index: -len(texts[index].ids))
    for start in range(0, len(alone), batch_size):
        whole = alone[start : start + batch_size]
        ids = _right_padded(model, [texts[index].ids[:-1] for index in whole])
        logits = model(input_ids=ids, use_cache=False).logits
        for row, index in enumerate(whole):
            results[index] = _judge(texts[index], None, logits[row, : len(texts[index].ids) - 1])
        done(len(whole))
    return results


def _prefill(
    model: Any, batch: Sequence[tuple[int, ...]], texts: Sequence[Sequence[ScoredText]]
) -> tuple[Any, list[Tensor | None], Tensor | None]:
    """Reads contexts, padded on the left.

    Returns:
        The cache, for every context its logits `[n, vocabulary]` where a text is scored by them, else None, and the
        mask `[B, P]`, None where nothing is padded.
    """
    longest = max(map(len, batch))
    ids = torch.tensor(
        [[0] * (longest - len(context)) + list(context) for context in batch], device=input_device(model)
    )
    cache, options = new_cache(model), {}
    mask = None
    if any(len(context) < longest for context in batch):
        lengths = torch.tensor([len(context) for context in batch], device=ids.device)
        mask = (torch.arange(longest, device=ids.device) >= longest - lengths[:, None]).long()
        options = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp_min(0)}
    # of how many of the last tokens each context's logits are needed
    wanted = [max(len(context) - min(text.first for text in own) + 1, 0) for context, own in zip(batch, texts)]
    logits = model(input_ids=ids, past_key_values=cache, logits_to_keep=max(*wanted, 1), **options).logits
    early = [logits[row, logits.shape[1] - count :] if count else None for row, count in enumerate(wanted)]
    return cache, early, mask


def _follow(
    model: Any, cache: Any, mask: Tensor | None, rows: Sequence[tuple[int, int]], texts: Sequence[ScoredText]
) -> Iterator[Tensor]:
    """Feeds what follows the contexts; yields the logits `[n, vocabulary]` of each.

    Padding on the right needs no mask: nothing that counts comes after it.
    """
    following = [texts[index].ids[texts[index].context : -1] for _, index in rows]
    ids = _right_padded(model, following)
    chosen = torch.tensor([row for row, _ in rows], device=ids.device)
    if chosen.tolist() != list(range(cache.batch_size)):
        cache.batch_select_indices(chosen)
    contexts = torch.tensor([texts[index].context for _, index in rows], device=ids.device)
    options = {"position_ids": contexts[:, None] + torch.arange(ids.shape[1], device=ids.device)}
    if mask is not None:
        options["attention_mask"] = torch.cat([mask[chosen], mask.new_ones(ids.shape)], dim=1)
    logits = model(input_ids=ids, past_key_values=cache, **options).logits
    for row, tokens in enumerate(following):
        yield logits[row, : len(tokens)]


def _judge(text: ScoredText, early: Tensor | None, late: Tensor) -> tuple[float, bool]:
    """Sums up one text.

    Args:
        text: that was fed.
        early: logits of the last tokens of its context, or None.
        late: logits of the tokens after the context, without the text's last one.
    """
    targets = torch.tensor(text.ids[text.first :], device=late.device)
    given = [late] if early is None else [early, late]
    skipped = sum(map(len, given)) - len(targets)
    likelihood, greedy, done = 0.0, True, 0
    for logits in _slices(given, skipped):
        expected = targets[done : done + len(logits)]
        log_probs = logits.float().log_softmax(-1)
        likelihood += float(log_probs.gather(-1, expected[:, None]).sum())
        greedy = greedy and bool((log_probs.argmax(-1) == expected).all())
        done += len(logits)
    return likelihood, greedy


def _slices(given: Sequence[Tensor], skipped: int) -> Iterator[Tensor]:
    """What comes after the first `skipped` rows of all that is given, `SLICE` rows at a time."""
    for logits in given:
        yield from logits[min(skipped, len(logits)) :].split(SLICE)
        skipped = max(skipped - len(logits), 0)


def _right_padded(model: Any, rows: Sequence[Sequence[int]]) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=input_device(model))
