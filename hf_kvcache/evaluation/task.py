"""`Task`: one long context and the questions about it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """Raw text, no chat template. A prompt is `context + question`, and the model should go on with `answer`.

    Args:
        name: of the kind of task, for tables.
        context: what is cached, and compressed before any question is known.
        questions: pairs of question and answer; an answer begins with a space.
    """

    name: str
    context: str
    questions: tuple[tuple[str, str], ...]
