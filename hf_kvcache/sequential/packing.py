"""Compressing the sections of a page: zstd where `zstandard` is installed, zlib elsewhere, raw where neither helps."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np

CODINGS = ("raw", "zlib", "zstd")
# below this a frame costs more than it saves
LEAST = 64
# ids that are packed at once, a multiple of 8: in between they take 32 times their bytes
RUN = 1 << 15


class PageError(ValueError):
    """A page that cannot be used: damaged, or another one than it should be."""


class UnreadablePage(PageError):
    """A page that is whole, but not for this reader: of a later format, signed with another secret, or coded with a
    package that is missing. Others can read it, so it is never removed for that."""


def zstd() -> Any:
    """The module `zstandard`, None where it is not installed."""
    try:
        import zstandard
    except ImportError:
        return None
    return zstandard


def compress(data: bytes | memoryview) -> tuple[str, bytes | memoryview]:
    """(coding, bytes), never longer than `data`."""
    if len(data) < LEAST:
        return "raw", data
    module = zstd()
    if module is None:
        coding, packed = "zlib", zlib.compress(data, 1)
    else:
        coding, packed = "zstd", module.ZstdCompressor(level=1, write_content_size=False).compress(data)
    return (coding, packed) if len(packed) < len(data) else ("raw", data)


def decompress(coding: str, data: memoryview, length: int) -> bytes | memoryview:
    """The `length` bytes that were compressed; never makes more than that."""
    if coding == "raw":
        result: bytes | memoryview = data
    elif coding == "zlib":
        result = _inflate(data, length)
    elif coding == "zstd":
        module = zstd()
        if module is None:
            raise UnreadablePage("the page is compressed with zstd, which is not installed; pip install zstandard")
        try:
            # a size in the frame would be allocated whatever the limit says
            if module.frame_content_size(data) not in (-1, length):
                raise PageError(f"a section of a page decompresses to other than the {length} bytes it says")
            result = module.ZstdDecompressor().decompress(data, max_output_size=max(length, 1), allow_extra_data=False)
        except module.ZstdError as error:
            raise PageError(f"a section of a page does not decompress ({error})") from None
    else:
        raise PageError(f"the coding of a section must be one of {', '.join(CODINGS)}, got {coding[:20]!r}")
    if len(result) != length:
        raise PageError(f"a section of a page has {len(result)} bytes, expected {length}")
    return result


def _inflate(data: memoryview, length: int) -> bytes:
    inflater = zlib.decompressobj()
    try:
        result = inflater.decompress(data, max(length, 1))
    except zlib.error as error:
        raise PageError(f"a section of a page does not decompress ({error})") from None
    if not inflater.eof or inflater.unused_data:
        raise PageError(f"a section of a page decompresses to more than the {length} bytes it says")
    return result


def split_planes(data: np.ndarray) -> list[np.ndarray]:
    """The bytes of numbers `[N]`, most significant plane first: exponents compress, mantissas do not."""
    planes = data.view(np.uint8).reshape(-1, data.itemsize)
    return [np.ascontiguousarray(planes[:, byte]) for byte in reversed(range(data.itemsize))]


def join_planes(planes: list[bytes | memoryview], dtype: np.dtype) -> np.ndarray:
    """The inverse of `split_planes`."""
    result = np.empty((len(planes[0]), len(planes)), dtype=np.uint8)
    for byte, plane in zip(reversed(range(len(planes))), planes, strict=True):
        result[:, byte] = np.frombuffer(plane, dtype=np.uint8)
    return result.reshape(-1).view(dtype)


def pack_ids(ids: np.ndarray) -> tuple[int, bytes]:
    """(bits an id, bytes) of token ids `[N]`, each in as many bits as the largest needs."""
    bits = max(int(ids.max(initial=0)).bit_length(), 1)
    places = np.arange(bits, dtype=np.uint32)
    spread = (
        ((ids[i : i + RUN, None].astype(np.uint32) >> places) & 1).astype(np.uint8) for i in range(0, len(ids), RUN)
    )
    return bits, b"".join(np.packbits(run.reshape(-1), bitorder="little").tobytes() for run in spread)


def unpack_ids(bits: int, data: bytes | memoryview, count: int) -> np.ndarray:
    """The inverse of `pack_ids`: `[count]`, uint32."""
    if not 1 <= bits <= 32 or len(data) != -(-bits * count // 8):
        raise PageError(f"{count} ids of {bits} bits do not fit {len(data)} bytes")
    packed, places = np.frombuffer(data, np.uint8), np.arange(bits, dtype=np.uint32)
    result = np.empty(count, dtype=np.uint32)
    for first in range(0, count, RUN):
        own = result[first : first + RUN]
        spread = np.unpackbits(packed[first * bits // 8 :], count=bits * len(own), bitorder="little")
        own[:] = (spread.reshape(-1, bits).astype(np.uint32) << places).sum(1, dtype=np.uint32)
    return result
