"""From what a user writes to a list of methods: names, instances and flat options."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any

from hf_kvcache.methods import METHODS, Method, SnapKV

MethodLike = str | Method | None


# how tables name our cache with nothing lost
NO_METHOD = "none"


def resolve(method: MethodLike | Sequence[str | Method], options: dict[str, Any]) -> list[Method]:
    """Turns `"kvsharer+offload"`, an instance, a list of either, or None (also `"none"`) into methods.

    Args:
        method: what the user named.
        options: flat options; each goes to the fields of that name of the methods named as text.

    Raises:
        ValueError: for an unknown method or option, or an option of a method that is not named.
    """
    parts = with_host(_implied(_parts(method), options))
    classes = {METHODS[part] for part in parts if isinstance(part, str)}
    valid = {name: [cls for cls in classes if name in option_names(cls)] for name in options}
    for name, owners in valid.items():
        if not owners:
            raise ValueError(_unknown_option(name, parts, classes))
    return [
        part
        if isinstance(part, Method)
        else METHODS[part](**{name: value for name, value in options.items() if METHODS[part] in valid[name]})
        for part in parts
    ]


def _implied(parts: list[str | Method], options: dict[str, Any]) -> list[str | Method]:
    """Adds the methods that an option alone asks for, where it belongs to none of the methods named."""
    owned = {name for part in parts if isinstance(part, str) for name in option_names(METHODS[part])}
    return parts + [cls.name for cls in METHODS.values() if cls.implied_by in options and cls.implied_by not in owned]


def with_host(parts: list[str | Method]) -> list[str | Method]:
    """Adds SnapKV, with which AdaKV, HeadKV and CriticalKV were published, to them when no scorer is named."""
    slots = {METHODS[part].slot if isinstance(part, str) else part.slot for part in parts}
    scored = any("scorer" in slot for slot in slots)
    return [*parts, SnapKV.name] if {"allocator", "selector"} & slots and not scored else parts


def option_names(method: type[Method]) -> list[str]:
    """The options of a method: its dataclass fields."""
    return [field.name for field in fields(method)]


def split_names(text: str) -> list[str]:
    """The names that are joined by `+`; a name may itself end in two of them (`yoco+++turboquant`)."""
    # the two are hidden where a name ends: at the end of the text or before the `+` that joins
    hidden = re.sub(r"\+\+(?=\s*(\+|$))", "\N{DAGGER}", text)
    return [name.replace("\N{DAGGER}", "++") for name in hidden.split("+")]


def _parts(method: MethodLike | Sequence[str | Method]) -> list[str | Method]:
    if method is None or method == NO_METHOD:
        return []
    given = list(method) if isinstance(method, Iterable) and not isinstance(method, str) else [method]
    parts: list[str | Method] = []
    for item in given:
        if isinstance(item, str):
            parts += [name.strip() for name in split_names(item)]
        elif isinstance(item, Method):
            parts.append(item)
        else:
            raise TypeError(f"a method is a name or a Method instance, got {type(item).__name__}: {item!r}")
    for name in parts:
        if isinstance(name, str) and name not in METHODS:
            raise ValueError(f"unknown method {name!r}{_meant(name)}; available: {', '.join(sorted(METHODS))}")
    return parts


def _meant(name: str) -> str:
    """What a misspelt name may have been, as the end of a sentence."""
    if "," in name:
        return " (several are joined by '+')"
    # as they are spelt in papers: SnapKV, expected-attention
    plain = re.sub(r"[-_ ]", "", name).lower()
    spelt = {re.sub("_", "", known): known for known in METHODS}
    found = difflib.get_close_matches(plain, spelt, n=1)
    return f" (did you mean {spelt[found[0]]!r}?)" if found else ""


def _unknown_option(name: str, parts: list[str | Method], classes: set[type[Method]]) -> str:
    owners = [method.name for method in METHODS.values() if name in option_names(method)]
    if owners:
        named = " + ".join(part if isinstance(part, str) else part.name for part in parts) or "None"
        where = "set it on the instance instead" if not classes and parts else "name that method, or drop the option"
        return f"option {name!r} belongs to {', '.join(owners)}, but the method is {named}; {where}"
    valid = sorted({option for cls in classes for option in option_names(cls)}) or ["none"]
    found = difflib.get_close_matches(name, ["method", "tokenizer", *valid], n=1)
    meant = f" (did you mean {found[0]!r}?)" if found else ""
    return f"unknown option {name!r}{meant}; valid options here: {', '.join(valid)}"
