"""Needles in prose, the passkey, and assignments to follow: a few sentences hidden in a text of any length."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from string import ascii_uppercase
from typing import Any

from hf_kvcache.evaluation.filler import drawn_sentences, largest_that_fits
from hf_kvcache.evaluation.task import Task
from hf_kvcache.evaluation.words import NOUNS

NIAH_HEADER = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize them. "
    "I will quiz you about the numbers afterwards.\n"
)
PASSKEY_HEADER = "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it.\n"
GRASS = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
TRACKING_HEADER = "Memorize and track the chain of variable assignments hidden in the following text.\n"


def niah(tokenizer: Any, length: int, seed: int, needles: int = 1, filler: str | None = None) -> Task:
    """Hides `needles` numbers of seven digits, each under a word, and asks for every one of them.

    Args:
        tokenizer: counts the tokens of the context.
        length: tokens of the context at most; it ends less than a sentence below.
        seed: of words, numbers, depths and the place where the filler begins.
        needles: how many, at independent random depths.
        filler: prose to hide them in; None for the shipped one.
    """
    if not 1 <= needles <= len(NOUNS):
        raise ValueError(f"needles must be from 1 to {len(NOUNS)}, got {needles}")
    random = Random(seed)
    words = random.sample(NOUNS, needles)
    numbers = [digits(random, 7) for _ in words]
    hidden = [f"One of the special magic numbers for {word} is: {number}." for word, number in zip(words, numbers)]
    depths = [random.random() for _ in words]
    prose = drawn_sentences(random, filler)
    asked = "What is the special magic number for {0} mentioned in the provided text? "
    asked += "The special magic number for {0} mentioned in the provided text is:"
    questions = tuple(("\n" + asked.format(word), f" {number}") for word, number in zip(words, numbers))

    def build(count: int) -> Task:
        text = " ".join(_insert(_take(prose, count), hidden, depths))
        return Task(f"niah-{needles}", NIAH_HEADER + text, questions)

    return largest_that_fits(tokenizer, length, build)


def passkey(tokenizer: Any, length: int, seed: int) -> Task:
    """Hides a key of five digits in a few sentences repeated over and over; arguments as for `niah`."""
    random = Random(seed)
    key, depth = digits(random, 5), random.random()
    hidden = f"The pass key is {key}. Remember it. {key} is the pass key."
    questions = (("\nWhat is the pass key? The pass key is", f" {key}"),)

    def build(count: int) -> Task:
        return Task("passkey", PASSKEY_HEADER + " ".join(_insert([GRASS] * count, [hidden], [depth])), questions)

    return largest_that_fits(tokenizer, length, build)


def tracking(tokenizer: Any, length: int, seed: int, hops: int = 1, filler: str | None = None) -> Task:
    """Hides a number of five digits and `hops` assignments that hand it on, in order; asks for the last variable.

    The other arguments are those of `niah`.
    """
    if hops < 0:
        raise ValueError(f"hops must not be negative, got {hops}")
    random = Random(seed)
    names: list[str] = []
    while len(names) <= hops:
        name = "".join(random.choices(ascii_uppercase, k=3))
        if name not in names:
            names.append(name)
    number = digits(random, 5)
    hidden = [f"VAR {name} = {value}." for name, value in zip(names, [number, *(f"VAR {name}" for name in names)])]
    depths = sorted(random.random() for _ in hidden)
    prose = drawn_sentences(random, filler)
    last = names[-1]
    question = f"\nQuestion: What is the numeric value of VAR {last}?\nAnswer: The numeric value of VAR {last} is"

    def build(count: int) -> Task:
        text = " ".join(_insert(_take(prose, count), hidden, depths))
        return Task(f"tracking-{hops}", TRACKING_HEADER + text, ((question, f" {number}"),))

    return largest_that_fits(tokenizer, length, build)


def digits(random: Random, count: int) -> str:
    """A number of so many digits that does not begin with zero."""
    return str(random.randrange(10 ** (count - 1), 10**count))


def _take(prose: Sequence[str], count: int) -> list[str]:
    """The first `count` sentences, round and round."""
    return [prose[index % len(prose)] for index in range(count)]


def _insert(prose: list[str], hidden: Sequence[str], depths: Sequence[float]) -> list[str]:
    """Puts each hidden sentence at its depth in [0, 1) of the prose; at one depth they keep their order."""
    result = list(prose)
    places = [int(depth * (len(prose) + 1)) for depth in depths]
    # from the back, so that the places before stay right
    for index in sorted(range(len(hidden)), key=lambda index: (places[index], index), reverse=True):
        result.insert(places[index], hidden[index])
    return result
