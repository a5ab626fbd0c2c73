"""A page with what is known about it, to the bytes of a file and back. What is read is checked before use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hf_kvcache.sequential import pagefile
from hf_kvcache.sequential.backends.backend import Entry
from hf_kvcache.sequential.identity import KEY, page_key
from hf_kvcache.sequential.packing import PageError, UnreadablePage, pack_ids, unpack_ids
from hf_kvcache.sequential.page import Coded, Context, Page, PageCodec

# longest page that is believed
MOST_TOKENS = 1 << 16
# bytes that the sections of a page may have over its plain keys and values
SLACK = 1 << 20
# seconds since the epoch, of a prefill, or bits
MOST = 1e12

FIELDS: dict[str, tuple[type, ...]] = {
    "key": (str,),
    "parent": (str,),
    "start": (int,),
    "tokens": (int,),
    "bits": (int,),
    "codec": (str,),
    "created": (float, int),
    "seconds": (float, int),
    "information": (float, int, type(None)),
    "model": (str,),
    "facts": (dict,),
}


@dataclass(frozen=True)
class Record:
    """A page in a store.

    Args:
        entry: what the index knows of it.
        data: the bytes of its file.
    """

    entry: Entry
    data: bytes


def write(page: Page, codec: PageCodec, context: Context, entry: Entry, secret: bytes = b"") -> Record:
    """Codes a page; `entry` says what is known of it beside its size."""
    coded = codec.encode(page, context)
    bits, ids = pack_ids(page.ids)
    description = {
        "key": entry.key,
        "parent": entry.parent,
        "start": page.start,
        "tokens": len(page),
        "bits": bits,
        "codec": codec.name,
        "created": entry.created,
        "seconds": entry.seconds,
        "information": entry.information,
        "model": entry.model,
        "facts": dict(coded.facts),
    }
    data = pagefile.dump(pagefile.PageFile(description, {"ids": ids, **coded.sections}), secret)
    return Record(Entry.of_header(description, page.ids, len(data)), data)


def annotated(data: bytes, information: float, secret: bytes = b"") -> bytes:
    """The file of a page with its information noted in the header."""
    file = pagefile.load(data, secret)
    return pagefile.dump(pagefile.PageFile({**file.description, "information": information}, file.sections), secret)


def summary(data: bytes, secret: bytes = b"") -> Entry:
    """What an index knows of a page, from its file; keys and values are not decoded."""
    file = pagefile.load(data, secret, _most_ids, only=("ids",))
    return Entry.of_header(dict(file.description), _ids(file), len(data))


def peek(data: bytes, size: int) -> Entry:
    """The same of a file of `size` bytes, from its first bytes; whether the rest is whole is not known.

    Raises:
        PageError: when the first bytes do not say it.
    """
    file = pagefile.peek(data, "ids", _most_ids)
    return Entry.of_header(dict(file.description), _ids(file), size)


def read(
    data: bytes,
    key: str,
    parent: str,
    codecs: dict[str, PageCodec],
    context: Context,
    secret: bytes,
    most_tokens: int = MOST_TOKENS,
) -> Page:
    """Decodes a page.

    Args:
        data: of the file.
        key, parent: that the page must have.
        codecs: that may have written it, by name.
        context: of the model that asks.
        secret: of the store.
        most_tokens: that the page may have. A page of a few bytes that says more takes the memory of so many.

    Raises:
        PageError: for a page that is damaged, another one than asked for, or does not fit the model.
    """
    token = 2 * context.geometry.token_bytes + 4
    file = pagefile.load(data, secret, lambda header: _checked(header, most_tokens)["tokens"] * token + SLACK)
    header, ids = file.description, _ids(file)
    if (header["key"], header["parent"]) != (key, parent) or page_key(parent, ids) != key:
        raise PageError(f"expected the page {key[:16]} behind {parent[:16]}, the file holds another one")
    if header["codec"] not in codecs:
        raise PageError(f"the page is coded by {header['codec'][:20]!r}, expected one of {', '.join(codecs)}")
    sections = {name: section for name, section in file.sections.items() if name != "ids"}
    return _decoded(codecs[header["codec"]], Coded(header["facts"], sections), ids, header["start"], context)


def _decoded(codec: PageCodec, coded: Coded, ids: np.ndarray, start: int, context: Context) -> Page:
    """The page; whatever its decoder stumbles over is a fault of the page, for who reads it a miss like any other."""
    try:
        return codec.decode(coded, ids, start, context)
    except PageError:
        raise
    except (MemoryError, torch.cuda.OutOfMemoryError) as error:
        raise UnreadablePage(f"there is no memory to decode a page of {len(ids)} tokens ({error})") from error
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise PageError(f"the page does not decode as {codec.name!r} ({type(error).__name__}: {error})") from error


def _most_ids(header: dict[str, Any]) -> int:
    return 4 * _checked(header)["tokens"]


def _checked(header: dict[str, Any], most_tokens: int = MOST_TOKENS) -> dict[str, Any]:
    """The header, when every field has its type and a possible value."""
    for name, types in FIELDS.items():
        if name not in header or type(header[name]) not in types:
            raise PageError(f"the header of a page has {name}={str(header.get(name))[:40]!r}, which cannot be")
    keys = all(KEY.fullmatch(header[name]) for name in ("key", "parent"))
    numbers = [header[name] for name in ("created", "seconds", "information") if header[name] is not None]
    if not keys or not 0 <= header["start"] < 1 << 31:
        raise PageError("the header of a page has a key or a position that cannot be")
    if not 0 < header["tokens"] <= most_tokens:
        raise PageError(f"a page has 1 to {most_tokens} tokens here, this one says {header['tokens']}")
    if not all(abs(number) < MOST for number in numbers):
        raise PageError("the header of a page has a time or an information that cannot be")
    return header


def _ids(file: pagefile.PageFile) -> np.ndarray:
    if "ids" not in file.sections:
        raise PageError("a page must have the section 'ids'")
    return unpack_ids(file.description["bits"], file.sections["ids"], file.description["tokens"])
