"""Scoring a filled cache: answers to questions, a verbatim copy, and how the text goes on.

A context is prefilled once. Every question is then asked on a copy of the cache, so that all of them meet the same
compressed context, and nothing is decoded: `question + answer` is fed in one forward (teacher-forcing), and the answer
counts as right when each of its tokens is the most likely one. The negative log-likelihood (NLL) of the answer moves
long before that changes.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_kvcache.devices import input_device
from hf_kvcache.evaluation.filler import token_ids
from hf_kvcache.evaluation.task import Task
from hf_kvcache.measure import Continuation, continued

RECALLED, LEAD = 128, 16


@dataclass(frozen=True)
class Answer:
    """How one answer was scored.

    Args:
        exact: every token of it was the most likely one.
        nll: mean over its tokens, in nats.
    """

    exact: bool
    nll: float


def context_ids(model: Any, tokenizer: Any, text: str) -> Tensor:
    """Token ids `[1, T]` of raw text, where the model takes them."""
    ids = torch.tensor([token_ids(tokenizer, text)], dtype=torch.long)
    return ids.to(input_device(model))


@torch.no_grad()
def filled_cache(model: Any, ids: Tensor) -> Any:
    """The cache after a prefill of `ids` `[1, T]`: compressed where the model is patched so."""
    return model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values


def score_answers(model: Any, tokenizer: Any, cache: Any, task: Task) -> list[Answer]:
    """Asks every question of a task on a copy of one cache that holds its context (question-agnostic).

    Args:
        model: that filled the cache.
        tokenizer: of the model.
        cache: a `KVCache` or another that `copy.deepcopy` copies. It is not changed.
        task: whose context the cache holds.
    """
    start = context_ids(model, tokenizer, task.context).shape[1]
    scored = []
    for question, answer in task.questions:
        ids, count = _with_answer(model, tokenizer, question, answer)
        scored.append(_score(continued(model, copy.deepcopy(cache), ids, start), count))
    return scored


def score_answers_aware(model: Any, tokenizer: Any, task: Task) -> list[Answer]:
    """Puts each question into the prompt, so that compression sees it (question-aware): one prefill a question.

    The prefill ends a token before the question does, and that token is the first one after the compression: the whole
    answer is then predicted from the compressed cache.
    """
    context = context_ids(model, tokenizer, task.context)
    scored = []
    for question, answer in task.questions:
        asked, count = _with_answer(model, tokenizer, question, answer)
        ids = torch.cat([context, asked], dim=1)
        prompt = ids.shape[1] - count - 1
        scored.append(_score(continued(model, filled_cache(model, ids[:, :prompt]), ids[:, prompt:], prompt), count))
    return scored


def recall(model: Any, tokenizer: Any, cache: Any, ids: Tensor) -> float:
    """NLL of a passage copied word for word from the middle of the prefix: what was thrown away shows here.

    Args:
        model, tokenizer: that filled the cache.
        cache: of the prefix; a copy is used.
        ids: the prefix `[1, T]`, at least 128 tokens. After an empty line 128 tokens from its middle are repeated; the
            first 16 only start the copying and are not scored.
    """
    length = ids.shape[1]
    if length < RECALLED:
        raise ValueError(f"recall needs a prefix of at least {RECALLED} tokens, got {length}; take a longer text")
    middle = (length - RECALLED) // 2
    break_ = context_ids(model, tokenizer, "\n\n")
    repeated = torch.cat([break_, ids[:, middle : middle + RECALLED]], dim=1)
    return _nll(continued(model, copy.deepcopy(cache), repeated, length), RECALLED - LEAD)


def natural(model: Any, cache: Any, ids: Tensor, prefix: int) -> Continuation:
    """How the text goes on after `ids[:, :prefix]`, scored on a copy of its cache.

    Compare it with that of the full cache by `measure.kl_divergence` and `measure.top1_agreement`.
    """
    return continued(model, copy.deepcopy(cache), ids[:, prefix:], prefix)


def _with_answer(model: Any, tokenizer: Any, question: str, answer: str) -> tuple[Tensor, int]:
    """Ids `[1, T]` of question and answer, and the number of the answer's tokens."""
    after = context_ids(model, tokenizer, answer)
    return torch.cat([context_ids(model, tokenizer, question), after], dim=1), after.shape[1]


def _score(continuation: Continuation, count: int) -> Answer:
    """Scores the last `count` tokens."""
    predicted, targets = continuation.log_probs[-count:].argmax(-1), continuation.targets[-count:]
    return Answer(bool((predicted == targets).all()), _nll(continuation, count))


def _nll(continuation: Continuation, count: int) -> float:
    """Mean NLL of the last `count` tokens."""
    last = Continuation(continuation.log_probs[-count:], continuation.targets[-count:], continuation.kv_bytes)
    return last.loss
