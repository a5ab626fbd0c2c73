"""The format of a page file: a JSON header, sections of raw bytes, and a checksum over all of it. No pickle.

    magic (8) | version u32 | header length u32 | header (JSON) | sections | signature (16)
    | BLAKE2b-128 of all before (16)

All integers are little-endian. The header says for every section its coding, its length as stored and its length
decoded; sections follow each other in that order without gaps. The magic is "HFKVPAGE" for a page without a signature
and "HFKVSIGN" for one with it: BLAKE2b-128 of all before, keyed with the store's secret. A store that has a secret
refuses a page that was not signed with it. The checksum needs no secret and ends every format, so that a reader can
tell a damaged page from one that is whole and not for him.

What is read is untrusted: every length is checked against what is there before anything is sliced, and a section is
decoded only into as many bytes as the caller expects.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from hf_kvcache.sequential import packing
from hf_kvcache.sequential.packing import PageError, UnreadablePage

MAGIC = b"HFKVPAGE"
SIGNED = b"HFKVSIGN"
VERSION = 1
CHECKSUM = 16
FRAME = struct.Struct("<8sII")
MAX_HEADER = 1 << 20
MAX_SECTIONS = 256
MOST = 1 << 31


@dataclass(frozen=True)
class PageFile:
    """A page as bytes.

    Args:
        description: JSON-able: key, parent, tokens, codec, model and what the codec adds.
        sections: bytes by name, not compressed.
    """

    description: Mapping[str, Any]
    sections: Mapping[str, bytes | memoryview] = field(default_factory=dict)


def checksum(data: bytes | memoryview, secret: bytes = b"") -> bytes:
    """BLAKE2b of 128 bits, keyed with up to 64 bytes of a secret."""
    return hashlib.blake2b(data, digest_size=CHECKSUM, key=secret).digest()


def dump(page: PageFile, secret: bytes = b"") -> bytes:
    """The bytes of a page file. Every section is compressed where that makes it smaller."""
    table, bodies = [], []
    for name, data in page.sections.items():
        coding, body = packing.compress(data)
        table.append({"name": name, "coding": coding, "stored": len(body), "length": len(data)})
        bodies.append(body)
    header = json.dumps({**page.description, "sections": table}, separators=(",", ":")).encode()
    if len(header) > MAX_HEADER:
        raise PageError(f"the header of a page may have {MAX_HEADER} bytes, this one has {len(header)}")
    whole = b"".join([FRAME.pack(SIGNED if secret else MAGIC, VERSION, len(header)), header, *bodies])
    if secret:
        whole += checksum(whole, secret)
    return whole + checksum(whole)


def load(
    data: bytes | memoryview,
    secret: bytes = b"",
    most: Callable[[dict[str, Any]], int] | None = None,
    only: tuple[str, ...] | None = None,
) -> PageFile:
    """Reads and checks what `dump` wrote.

    Args:
        data: the whole file.
        secret: of the store.
        most: from the header, how many bytes all sections together may decode to; also the place to refuse a header.
        only: names of the sections to decode; None for all.

    Raises:
        PageError: for anything but a whole, undamaged page of this format; the kind `UnreadablePage` where the page is
            whole, and where there is no memory for it.
    """
    data = memoryview(data)
    header, body = _frame(data, secret)
    limit = MOST if most is None else most(header)
    sections: dict[str, bytes | memoryview] = {}
    offset = total = 0
    for name, coding, stored, length in _table(header):
        wanted = only is None or name in only
        total += length if wanted else 0
        if stored > len(body) - offset or total > limit:
            raise PageError(f"section {name!r} of a page says {stored} bytes, {length} decoded: more than there may be")
        if wanted:
            try:
                sections[name] = packing.decompress(coding, body[offset : offset + stored], length)
            except MemoryError as error:
                raise UnreadablePage(f"there is no memory for {length} bytes of a page ({error})") from error
        offset += stored
    if offset != len(body):
        raise PageError(f"a page has {len(body) - offset} bytes that belong to no section")
    return PageFile({name: value for name, value in header.items() if name != "sections"}, sections)


def peek(data: bytes | memoryview, name: str, most: Callable[[dict[str, Any]], int]) -> PageFile:
    """Header and first section of a page without a signature, of which only the beginning was read. Nothing vouches
    for what it says: for lists of pages, not for their use.

    Args:
        data: the first bytes of the file.
        name: that the first section must have.
        most: from the header, how many bytes the section may decode to.

    Raises:
        PageError: when they are not in these bytes.
    """
    data = memoryview(data)
    magic, version, length = _magic(data)
    _check_signature(magic == SIGNED, data, data, b"")
    header, body = _header(data, version, length)
    table = _table(header)
    if not table or table[0][0] != name or table[0][2] > len(body) or table[0][3] > most(header):
        raise PageError(f"the first bytes of a page must hold its section {name!r}")
    _, coding, stored, decoded = table[0]
    return PageFile(header, {name: packing.decompress(coding, body[:stored], decoded)})


def _frame(data: memoryview, secret: bytes) -> tuple[dict[str, Any], memoryview]:
    """Header and sections of a page whose checksum is right."""
    magic, version, length = _magic(data)
    end = len(data) - CHECKSUM
    if checksum(data[:end]) != bytes(data[end:]):
        raise PageError("the checksum of a page is wrong: it is damaged or truncated")
    if version > VERSION:
        raise UnreadablePage(f"the page has format {version}, this version reads up to {VERSION}; upgrade hf_kvcache")
    if magic == SIGNED:
        end -= CHECKSUM
    _check_signature(magic == SIGNED, data[:end], data[end : end + CHECKSUM], secret)
    return _header(data[:end], version, length)


def _magic(data: memoryview) -> tuple[bytes, int, int]:
    """Magic, format and length of the header."""
    if len(data) < FRAME.size + CHECKSUM:
        raise PageError(f"a page has at least {FRAME.size + CHECKSUM} bytes, got {len(data)}: it is truncated")
    magic, version, length = FRAME.unpack_from(data)
    if magic not in (MAGIC, SIGNED):
        raise PageError(f"not a page file: it begins with {bytes(magic)!r}, expected {MAGIC!r} or {SIGNED!r}")
    return magic, version, length


def _header(data: memoryview, version: int, length: int) -> tuple[dict[str, Any], memoryview]:
    """The header, and what follows it."""
    if not 1 <= version <= VERSION or length > min(MAX_HEADER, len(data) - FRAME.size):
        raise PageError(f"the page says format {version} and a header of {length} bytes, which it cannot have")
    try:
        header = json.loads(bytes(data[FRAME.size : FRAME.size + length]))
    except (ValueError, RecursionError) as error:
        raise PageError(f"the header of a page is not JSON ({error})") from None
    if not isinstance(header, dict):
        raise PageError(f"the header of a page must be an object, got {type(header).__name__}")
    return header, data[FRAME.size + length :]


def _check_signature(signed: bool, data: memoryview, signature: memoryview, secret: bytes) -> None:
    if signed and not secret:
        raise UnreadablePage("the page is signed with a secret; open the store with the same one")
    if secret and not signed:
        raise UnreadablePage("the page is not signed, and the store has a secret; open it without one to read the page")
    if signed and not hmac.compare_digest(checksum(data, secret), bytes(signature)):
        raise UnreadablePage("the page is signed with another secret; open the store with the one it was written with")


def _table(header: dict[str, Any]) -> list[tuple[str, str, int, int]]:
    """(name, coding, stored, length) of every section, each of the right type."""
    table = header.get("sections")
    if not isinstance(table, list) or len(table) > MAX_SECTIONS:
        raise PageError(f"the sections of a page must be a list of at most {MAX_SECTIONS}")
    rows: list[tuple[str, str, int, int]] = []
    for entry in table:
        match entry:
            case {"name": str(name), "coding": str(coding), "stored": int(stored), "length": int(length)} if (
                min(stored, length) >= 0
            ):
                rows.append((name, coding, stored, length))
            case _:
                raise PageError(f"a section of a page has a name, a coding and two lengths, got {str(entry)[:80]}")
    if len({row[0] for row in rows}) != len(rows):
        raise PageError("two sections of a page have one name")
    return rows
