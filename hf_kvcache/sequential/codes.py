"""Packing small integers, most of them zero, for a byte coder.

Rows are coefficients, columns tokens. Rows come sorted by their size, so that a block of some of them has one statistic
and a table of its own. A block whose codes reach -1..1 goes five to a byte, -2..2 three, -7..7 two, wider ones one; the
few that reach further are escapes, listed by place and value. A block of zeros takes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from hf_kvcache.sequential.packing import PageError

ROWS = 256
# (largest magnitude, codes a byte); the base is 2 x largest + 1
PACKINGS = ((0, 0), (1, 5), (2, 3), (7, 2), (127, 1))
# one code in so many may be an escape, which costs eight bytes
RARE = 4096


def pack_codes(codes: np.ndarray) -> tuple[dict[str, Any], dict[str, bytes]]:
    """JSON-able facts, and sections by name, of codes `[J, n]`, int32."""
    kinds, sections = [], {}
    places, values = [], []
    for start in range(0, len(codes), ROWS):
        block = codes[start : start + ROWS]
        size = np.abs(block)
        kind = next(
            (kind for kind, (most, _) in enumerate(PACKINGS) if int((size > most).sum()) * RARE <= block.size),
            len(PACKINGS) - 1,
        )
        most, each = PACKINGS[kind]
        far = np.argwhere(size > most)
        places.append(((far[:, 0] + start) * codes.shape[1] + far[:, 1]).astype("<u4"))
        values.append(block[far[:, 0], far[:, 1]].astype("<i4"))
        kinds.append(kind)
        if each:
            sections[f"codes{len(kinds) - 1}"] = _to_bytes(np.where(size > most, 0, block), most, each)
    if sum(map(len, places)):
        sections["places"] = np.concatenate(places).tobytes()
        sections["values"] = np.concatenate(values).tobytes()
    return {"kinds": kinds}, sections


def unpack_codes(facts: Mapping[str, Any], sections: Mapping[str, Any], shape: tuple[int, int]) -> np.ndarray:
    """The inverse of `pack_codes`, as int32 `[J, n]`."""
    rows = shape[0]
    kinds = facts.get("kinds")
    if not isinstance(kinds, list) or len(kinds) != -(-rows // ROWS):
        raise PageError(f"{rows} coefficients need {-(-rows // ROWS)} blocks of codes")
    codes = np.zeros(shape, dtype=np.int32)
    for index, kind in enumerate(kinds):
        if type(kind) is not int or not 0 <= kind < len(PACKINGS):
            raise PageError(f"a block of codes has the kind {str(kind)[:20]!r}, expected 0 to {len(PACKINGS) - 1}")
        most, each = PACKINGS[kind]
        block = codes[index * ROWS : (index + 1) * ROWS]
        if each:
            block[:] = _from_bytes(sections.get(f"codes{index}"), block.size, most, each).reshape(block.shape)
    places = np.frombuffer(sections.get("places", b""), dtype=np.uint8)
    values = np.frombuffer(sections.get("values", b""), dtype=np.uint8)
    if len(places) != len(values) or len(places) % 4:
        raise PageError("the escapes of a page have other places than values")
    where = places.view("<u4").astype(np.int64)
    if len(where) and int(where.max()) >= codes.size:
        raise PageError("an escape of a page lies outside of it")
    codes.reshape(-1)[where] = values.view("<i4")
    return codes


def _to_bytes(block: np.ndarray, most: int, each: int) -> bytes:
    base = 2 * most + 1
    flat = (block.reshape(-1) + most).astype(np.uint8)
    flat = np.pad(flat, (0, -len(flat) % each), constant_values=most)
    powers = base ** np.arange(each)
    return (flat.reshape(-1, each) * powers).sum(1).astype(np.uint8).tobytes()


def _from_bytes(data: Any, count: int, most: int, each: int) -> np.ndarray:
    if data is None or len(data) != -(-count // each):
        raise PageError(f"a block of {count} codes must have {-(-count // each)} bytes")
    base = 2 * most + 1
    table = (np.arange(256)[:, None] // base ** np.arange(each) % base - most).astype(np.int32)
    return table[np.frombuffer(data, dtype=np.uint8)].reshape(-1)[:count]
