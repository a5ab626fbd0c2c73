"""What the docstrings of a method say of its options, for the command line and the documentation."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields


@dataclass(frozen=True)
class Option:
    """One option of a method.

    Args:
        name: as it is given.
        default: as Python writes it; empty for an option that must be given.
        meaning: a sentence or two.
    """

    name: str
    default: str
    meaning: str


def options_of(method: type) -> Iterator[Option]:
    """The options of a method, as its class and the bases of that describe them."""
    described: dict[str, str] = {}
    for cls in reversed(method.__mro__):
        found = re.search(r"Args:\n(.*?)(\n\s*\n|\Z)", inspect.getdoc(cls) or "", re.DOTALL)
        for names, text in re.findall(r"^    ([\w, ]+): (.*?)(?=^    \w|\Z)", found[1] if found else "", re.M | re.S):
            described |= dict.fromkeys(names.replace(" ", "").split(","), " ".join(text.split()))
    for field in fields(method):
        default = "" if field.default is MISSING else repr(field.default)
        yield Option(field.name, default, described.get(field.name, ""))


def summary_of(method: type) -> str:
    """What a method does, in one line."""
    return (method.__doc__ or "").splitlines()[0]
