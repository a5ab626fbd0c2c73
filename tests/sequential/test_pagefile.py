"""The format of pages: nothing is lost, nothing damaged is believed, nothing is read out of bounds."""

import json
import os
import struct

import numpy as np
import pytest
import torch

from hf_kvcache.sequential import packing, pagefile, record
from hf_kvcache.sequential.backends import Entry
from hf_kvcache.sequential.identity import page_key, require_key
from hf_kvcache.sequential.lossless import Lossless
from hf_kvcache.sequential.packing import PageError, UnreadablePage
from hf_kvcache.sequential.page import Context, Geometry
from hf_kvcache.sequential.store import Match, PrefixStore
from hf_kvcache.sequential.trials import (
    CODECS,
    CONTEXT,
    GEOMETRY,
    IDENTITY,
    header_end,
    random_page,
    resigned,
    same,
    tampered,
    with_header,
)

FUZZ = int(os.environ.get("HF_KVCACHE_FUZZ", "5000"))


def written(page, context=CONTEXT, secret=b"", parent=IDENTITY.root):
    entry = Entry(page_key(parent, page.ids), parent, page.ids, page.start, "lossless", 0, 1.0)
    return record.write(page, Lossless(), context, entry, secret)


def read(data, key, parent=IDENTITY.root, context=CONTEXT, secret=b""):
    return record.read(data, key, parent, CODECS, context, secret)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 7, 256])
def test_a_page_is_the_same_after_a_round_trip(dtype, tokens):
    geometry = Geometry(GEOMETRY.producers, GEOMETRY.heads, GEOMETRY.dims, dtype)
    page, context = random_page(1, tokens, 512, geometry), Context(geometry)
    file = written(page, context)
    assert same(read(file.data, file.entry.key, context=context), page)
    assert record.summary(file.data).key == file.entry.key
    assert file.entry.size == len(file.data)


def test_numbers_that_are_no_numbers_are_kept_bit_for_bit():
    bits = torch.tensor([0, -1, 0x7F800000, 0x7FC00001, -0x80000000, 1], dtype=torch.int32)
    page = random_page()
    page.keys[0].view(-1)[:6] = bits.view(torch.float32)
    file = written(page)
    assert torch.equal(read(file.data, file.entry.key).flat().view(torch.int32), page.flat().view(torch.int32))


@pytest.mark.parametrize("ids", [[0], [1], [49151, 0, 3], [2**32 - 1, 5], list(range(256))])
def test_ids_are_packed_in_the_fewest_bits(ids):
    ids = np.array(ids, dtype=np.uint32)
    bits, data = packing.pack_ids(ids)
    assert bits == max(int(ids.max()).bit_length(), 1) and len(data) == -(-bits * len(ids) // 8)
    assert np.array_equal(packing.unpack_ids(bits, data, len(ids)), ids)


@pytest.mark.parametrize("data", [b"", b"x", b"a" * 5000, os.urandom(5000), bytes(64)], ids=len)
def test_sections_are_never_longer_than_raw(data):
    coding, packed = packing.compress(data)
    assert len(packed) <= len(data)
    assert bytes(packing.decompress(coding, memoryview(packed), len(data))) == data


def test_without_zstd_pages_are_written_and_those_of_others_named(monkeypatch):
    page = random_page(tokens=64)
    with_zstd = written(page)
    monkeypatch.setattr(packing, "zstd", lambda: None)
    file = written(page)
    assert same(read(file.data, file.entry.key), page)
    if b'"zstd"' in with_zstd.data:
        with pytest.raises(UnreadablePage, match="pip install zstandard"):
            read(with_zstd.data, with_zstd.entry.key)


def test_every_flipped_bit_is_found():
    file = written(random_page(tokens=2))
    data = bytearray(file.data)
    for bit in range(8 * len(data)):
        data[bit // 8] ^= 1 << bit % 8
        with pytest.raises(PageError):
            read(bytes(data), file.entry.key)
        data[bit // 8] ^= 1 << bit % 8
    read(bytes(data), file.entry.key)


def test_every_truncation_is_found():
    file = written(random_page(tokens=2))
    for length in range(len(file.data)):
        with pytest.raises(PageError):
            read(file.data[:length], file.entry.key)
    with pytest.raises(PageError):
        read(file.data + b"\0", file.entry.key)


def test_a_later_format_and_other_files_are_named():
    file = written(random_page())
    later = bytearray(file.data)
    struct.pack_into("<I", later, 8, pagefile.VERSION + 1)
    with pytest.raises(UnreadablePage, match=r"format 2.*upgrade"):
        read(resigned(bytes(later)), file.entry.key)
    with pytest.raises(PageError, match="not a page file"):
        read(b"PK\3\4" + bytes(100), file.entry.key)


def test_a_page_must_be_the_one_asked_for():
    page = random_page()
    file = written(page)
    for key, parent in (("0" * 64, IDENTITY.root), (file.entry.key, "0" * 64)):
        with pytest.raises(PageError, match="another one"):
            read(file.data, key, parent)
    # one that says that it is: its tokens tell
    header = json.loads(file.data[16 : header_end(file.data)])
    with pytest.raises(PageError, match="another one"):
        read(with_header(file.data, {**header, "key": "f" * 64}), "f" * 64)


def test_a_page_of_another_shape_is_refused():
    file = written(random_page())
    for geometry in (
        Geometry((0, 1), (2, 2), (8, 8), torch.float32),
        Geometry(GEOMETRY.producers, GEOMETRY.heads, GEOMETRY.dims, torch.bfloat16),
    ):
        with pytest.raises(PageError, match="planes"):
            read(file.data, file.entry.key, context=Context(geometry))


def test_signed_pages_need_the_secret():
    file = written(random_page(), secret=b"one")
    assert same(read(file.data, file.entry.key, secret=b"one"), random_page())
    for secret, said in ((b"", "signed with a secret"), (b"two", "another secret")):
        with pytest.raises(UnreadablePage, match=said):
            read(file.data, file.entry.key, secret=secret)
    with pytest.raises(UnreadablePage, match="not signed"):
        read(written(random_page()).data, file.entry.key, secret=b"one")
    forged = bytearray(file.data)
    forged[-2 * pagefile.CHECKSUM - 1] ^= 1
    with pytest.raises(UnreadablePage, match="another secret"):
        read(resigned(bytes(forged)), file.entry.key, secret=b"one")
    # damage is damage, whoever reads it
    for secret in (b"", b"one"):
        with pytest.raises(PageError, match="damaged") as raised:
            read(bytes(forged), file.entry.key, secret=secret)
        assert not isinstance(raised.value, UnreadablePage)


@pytest.mark.parametrize("name", ["zstd", "zlib"])
def test_a_bomb_is_not_inflated(name):
    """A section that decompresses to far more than it says, and one that says far more than may be."""
    zeros = bytes(1 << 26)
    if name == "zstd":
        zstandard = pytest.importorskip("zstandard", reason="zstandard is not installed")
        bombs = [zstandard.ZstdCompressor(write_content_size=size).compress(zeros) for size in (True, False)]
    else:
        bombs = [__import__("zlib").compress(zeros)]
    for bomb in bombs:
        with pytest.raises(PageError):
            packing.decompress(name, memoryview(bomb), 100)
    file = written(random_page())
    header = json.loads(file.data[16 : header_end(file.data)])
    header["sections"][1].update(length=1 << 40)
    with pytest.raises(PageError, match="more than there may be"):
        read(with_header(file.data, header), file.entry.key)


@pytest.mark.parametrize("key", ["../../etc/passwd", "a/b", "", "f" * 63, "F" * 64, "f" * 64 + "\n", None])
def test_keys_are_keys(key):
    with pytest.raises(ValueError, match="64 hexadecimal digits"):
        require_key(key)


def test_the_parser_survives_tampered_pages():
    """Every input is a page, unchanged in what it stands for, or a PageError; nothing else is raised."""
    page = random_page(tokens=3)
    file = written(page)
    accepted = 0
    for data in tampered(file.data, FUZZ):
        try:
            found = read(data, file.entry.key)
        except PageError:
            continue
        accepted += 1
        assert np.array_equal(found.ids, page.ids) and len(found.keys) == 3
        assert [tuple(key.shape) for key in found.keys] == [(2, 3, 8), (2, 3, 8), (1, 3, 4)]
    assert accepted < FUZZ / 2


@pytest.mark.parametrize(
    "raised", [RuntimeError, IndexError, KeyError, torch.linalg.LinAlgError, np.linalg.LinAlgError]
)
def test_what_a_decoder_stumbles_over_is_a_bad_page(raised, monkeypatch):
    file = written(random_page())

    def stumble(*_):
        raise raised("over this")

    monkeypatch.setattr(Lossless, "decode", stumble)
    with pytest.raises(PageError, match=r"lossless.*over this") as found:
        read(file.data, file.entry.key)
    assert not isinstance(found.value, UnreadablePage)


def test_a_lack_of_memory_is_no_fault_of_the_page(monkeypatch):
    file = written(random_page())
    monkeypatch.setattr(Lossless, "decode", lambda *_: (_ for _ in ()).throw(torch.cuda.OutOfMemoryError("none left")))
    with pytest.raises(UnreadablePage, match="none left"):
        read(file.data, file.entry.key)


def test_no_memory_for_a_section_is_no_fault_of_the_page(monkeypatch):
    file = written(random_page())
    monkeypatch.setattr(packing, "decompress", lambda *_: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(UnreadablePage, match="no memory for 16 bytes"):
        read(file.data, file.entry.key)


def test_a_page_says_no_more_tokens_than_the_store_gives_one(tmp_path):
    """A few bytes would be decoded into the memory of thousands of tokens."""
    store, page = PrefixStore(tmp_path, page_size=8), random_page(tokens=9)
    file = written(page)
    assert same(record.read(file.data, file.entry.key, IDENTITY.root, CODECS, CONTEXT, b"", 9), page)
    store.backend.write(file.entry, file.data)
    with pytest.warns(RuntimeWarning, match="1 to 8 tokens here, this one says 9"):
        assert store.load(Match(file.entry.key, IDENTITY.root, 0, 8), CODECS, CONTEXT) is None
