"""How much every head matters for retrieval: HeadKV's importance, measured with needles in long texts.

Two sentences of one form, the evidence and a distractor, are put into a long text at varying depths, and the model is
asked for what only the evidence says. For a query head, while the model writes the answer:

    score = mean over the answer's tokens of  sum of A_i over (top-k of A) and (evidence)  / k ,  k = evidence length

averaged over the prompts that the model answers rightly (arXiv 2410.19258, the R2 score: attention to the correct
evidence; the retrieval-head papers before it count only copied tokens). The prompts are our own and plainer than the
authors', whose evidence takes a step of reasoning; an answer is right when every token is the model's first choice,
where theirs asks for F1 > 50.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_kvcache.attention import AttentionCall, SharingContext
from hf_kvcache.calibration.texts import find_tokenizer, token_windows
from hf_kvcache.eviction import Observation, Reading
from hf_kvcache.eviction.importance import HeadImportance
from hf_kvcache.progress import progress
from hf_kvcache.sharing import SharingPlan

if TYPE_CHECKING:
    from hf_kvcache.calibration.probe import ModelProbe

PLACES = (
    "Lisbon",
    "Oslo",
    "Cairo",
    "Lima",
    "Dublin",
    "Athens",
    "Prague",
    "Madrid",
    "Vienna",
    "Warsaw",
    "Tokyo",
    "Berlin",
)
EVIDENCE = " The access code for {place} is {code}."
QUESTION = "\n\nQuestion: What is the access code for {place}?\nAnswer: The access code for {place} is"
ANSWER = " {code}"


@dataclass(frozen=True)
class NeedlePrompt:
    """One question about a long text.

    Args:
        ids: the text, the question and all but the last token of the answer, `[T]`.
        answer: token ids of the answer, `[A]`; the last A positions of `ids` predict them.
        evidence: where the evidence lies, as (first, end).
    """

    ids: Tensor
    answer: Tensor
    evidence: tuple[int, int]


@torch.no_grad()
def measure_head_importance(probe: ModelProbe, samples: int, length: int) -> HeadImportance:
    """The importance of every query head; raises when the model answers no prompt."""
    total, right = torch.zeros(()), 0
    with probe.attached(), progress("measuring retrieval heads", samples) as advance:
        for prompt in needle_prompts(probe, samples, length):
            scores, correct = run_prompt(probe, prompt)
            if correct:
                total, right = total + scores, right + 1
            advance()
    if not right:
        raise ValueError(
            f"the model answered none of {samples} questions about texts of {length} tokens, so its retrieval heads "
            "cannot be measured; try shorter texts, or pass importance="
        )
    settings = {"samples": str(samples), "length": str(length), "answered": str(right)}
    return HeadImportance((total / right).float(), probe.fingerprint, settings)


def needle_prompts(probe: ModelProbe, samples: int, length: int) -> list[NeedlePrompt]:
    """Prompts of about `length` tokens, the same for every call, with the evidence at depths from first to last."""
    tokenizer = probe.tokenizer or find_tokenizer(probe.model)

    def encode(text: str) -> Tensor:
        return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.long)

    start = torch.tensor(tokenizer("")["input_ids"], dtype=torch.long)
    draw = random.Random(0)
    prompts = []
    for index, text in enumerate(token_windows(None, probe.model, tokenizer, samples, length)):
        place, other = draw.sample(PLACES, 2)
        codes = [str(draw.randrange(10_000, 100_000)) for _ in range(2)]
        evidence = encode(EVIDENCE.format(place=place, code=codes[0]))
        distractor = encode(EVIDENCE.format(place=other, code=codes[1]))
        question, answer = encode(QUESTION.format(place=place)), encode(ANSWER.format(code=codes[0]))
        text = text[: length - sum(map(len, (start, evidence, distractor, question, answer)))]
        if len(text) < 2:
            raise ValueError(f"length must leave room for the text around the question, got {length}; raise it")
        depth = round(index / max(samples - 1, 1) * len(text))
        # half a text further on, around the end
        elsewhere = (depth + len(text) // 2) % len(text)
        pieces = sorted([(depth, 0, evidence), (elsewhere, 1, distractor)], key=lambda piece: piece[:2])
        parts, first, done = [start], 0, 0
        for at, which, piece in pieces:
            parts += [text[done:at]]
            first = sum(map(len, parts)) if which == 0 else first
            parts, done = [*parts, piece], at
        ids = torch.cat([*parts, text[done:], question, answer[:-1]])
        prompts.append(NeedlePrompt(ids, answer, (first, first + len(evidence))))
    return prompts


def run_prompt(probe: ModelProbe, prompt: NeedlePrompt) -> tuple[Tensor, bool]:
    """The score of every query head `[layers, H_q]`, and whether the model gives the answer. Inside `attached` only."""
    recorder = RetrievalRecorder(probe.full.sharing, prompt)
    batch = probe.batch(prompt.ids[None])
    hidden = batch.hidden
    for layer in range(probe.num_layers):
        hidden = probe.run_layer(layer, hidden, batch, recorder)
    logits = probe.model.get_output_embeddings()(probe.norm(hidden)[:, -len(prompt.answer) :])
    correct = torch.equal(logits[0].argmax(-1).cpu(), prompt.answer)
    return torch.stack([recorder.scores[layer] for layer in range(probe.num_layers)]), correct


class RetrievalRecorder(SharingContext):
    """Looks at the attention of the answer's tokens while a forward without a cache goes through the layers."""

    def __init__(self, plan: SharingPlan, prompt: NeedlePrompt) -> None:
        super().__init__(plan)
        self.prompt = prompt
        self.scores: dict[int, Tensor] = {}

    def resolve(self, call: AttentionCall, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        key, value = super().resolve(call, key, value)
        query = call.query[:, :, -len(self.prompt.answer) :]
        seen = Observation(key, value, [Reading(query, call.module)], call.scale, call.softcap)
        self.scores[call.layer] = retrieval_score(seen.attention()[0].flatten(0, 1), self.prompt.evidence).cpu()
        return key, value


def retrieval_score(weights: Tensor, evidence: tuple[int, int]) -> Tensor:
    """How much of the top of attention `[H_q, A, T]` lies on the evidence; returns `[H_q]`."""
    first, end = evidence
    top = weights.topk(min(end - first, weights.shape[-1]), dim=-1)
    inside = (top.indices >= first) & (top.indices < end)
    return (top.values * inside).sum(-1).mean(-1) / (end - first)
