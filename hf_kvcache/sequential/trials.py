"""Trials of a store that its tests and benchmarks share: random pages, tampered pages, killed and competing writers."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import random
import signal
import struct
import time
import warnings
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path

import numpy as np
import torch

from hf_kvcache.sequential import pagefile
from hf_kvcache.sequential.identity import Identity
from hf_kvcache.sequential.lossless import Lossless
from hf_kvcache.sequential.page import Context, Geometry, Page, PageCodec
from hf_kvcache.sequential.store import PrefixStore

GEOMETRY = Geometry((0, 1, 3), (2, 2, 1), (8, 8, 4), torch.float32)
CONTEXT = Context(GEOMETRY)
CODECS: dict[str, PageCodec] = {"lossless": Lossless()}
IDENTITY = Identity("model", "weights", "torch.float32", (0, 1, 1, 3), "lossless", 8)


def random_page(seed: int = 0, tokens: int = 8, start: int = 0, geometry: Geometry = GEOMETRY) -> Page:
    """A page of a model that does not exist; equal for equal arguments."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 50000, (tokens,), generator=generator).numpy().astype(np.uint32)
    flat = torch.randn(geometry.numbers * tokens, generator=generator).to(geometry.dtype)
    return Page(ids, start, *geometry.split(flat, tokens))


def chain(count: int, seed: int = 0, tokens: int = 8, behind: int = 0) -> list[Page]:
    """Pages that follow each other and so many others, of different sessions for different seeds."""
    return [random_page(1000 * seed + index, tokens, (behind + index) * tokens) for index in range(count)]


def put_chain(store: PrefixStore, pages: Sequence[Page], **known) -> list[str | None]:
    """Stores pages one behind the other; returns their keys."""
    parent, keys = IDENTITY.root, []
    for page in pages:
        key = store.put(page, parent, CODECS["lossless"], CONTEXT, **known)
        keys.append(key)
        parent = key or parent
    return keys


def ids_of(pages: Sequence[Page]) -> np.ndarray:
    """The token ids of pages that follow each other."""
    return np.concatenate([page.ids for page in pages])


def restored(store: PrefixStore, ids: np.ndarray, identity: Identity = IDENTITY) -> list[Page | None]:
    """What a store gives for a prompt."""
    return [store.load(match, CODECS, CONTEXT) for match in store.match(identity, ids)]


def same(one: Page | None, other: Page) -> bool:
    """Whether a page that was read is the one that was written, bit for bit."""
    if one is None or not np.array_equal(one.ids, other.ids):
        return False
    pairs = zip([*one.keys, *one.values], [*other.keys, *other.values], strict=True)
    return all(torch.equal(mine, theirs) for mine, theirs in pairs)


def resigned(data: bytes) -> bytes:
    """A page file with a checksum that is right, as somebody who knows the format would write it."""
    return data[: -pagefile.CHECKSUM] + pagefile.checksum(data[: -pagefile.CHECKSUM])


def with_header(data: bytes, header: dict) -> bytes:
    """A page file with another header and a checksum that is right."""
    text = json.dumps(header).encode()
    return resigned(data[:8] + struct.pack("<II", 1, len(text)) + text + data[header_end(data) :])


def header_end(data: bytes) -> int:
    """Where the header of a page file ends."""
    return pagefile.FRAME.size + struct.unpack_from("<I", data, 12)[0]


def tampered(data: bytes, count: int, seed: int = 0) -> Iterator[bytes]:
    """Variants of a page file: bytes, runs of bytes, fields of the header or numbers of a section changed, or all of it
    random. The checksum is right in nine of ten."""
    choose = random.Random(seed)
    values = [0, 1, -1, 2**31, 2**63, 2**70, -(2**70), 1.5, "", "x" * 300, None, True, [], {}, [[]], "../x", 1e308]
    for _ in range(count):
        changed = bytearray(data)
        kind = choose.randrange(5)
        if kind == 0:
            for _ in range(choose.randrange(1, 8)):
                changed[choose.randrange(len(changed))] = choose.randrange(256)
        elif kind == 1:
            start = choose.randrange(len(changed))
            changed[start : start + choose.randrange(64)] = choose.randbytes(choose.randrange(64))
        elif kind == 2:
            header = json.loads(data[pagefile.FRAME.size : header_end(data)])
            target = choose.choice([header, header["facts"], *header["sections"]])
            target[choose.choice([*target, "other"])] = choose.choice(values)
            changed = bytearray(with_header(data, header))
        elif kind == 3:
            changed = bytearray(_with_no_number(data, choose))
        else:
            changed = bytearray(choose.randbytes(choose.randrange(len(data))))
            changed[:8] = pagefile.MAGIC
        yield bytes(changed) if choose.random() < 0.1 else resigned(bytes(changed))


def _with_no_number(data: bytes, choose: random.Random) -> bytes:
    """A page file in whose sections a number is infinite or none, of 16 or 32 bits."""
    file = pagefile.load(data)
    sections = {name: bytearray(section) for name, section in file.sections.items()}
    name = choose.choice([name for name, section in sections.items() if len(section) >= 4])
    number = struct.pack(choose.choice("ef"), choose.choice([math.inf, -math.inf, math.nan]))
    place = choose.randrange(len(sections[name]) // len(number)) * len(number)
    sections[name][place : place + len(number)] = number
    return pagefile.dump(pagefile.PageFile(file.description, {name: bytes(own) for name, own in sections.items()}))


def write_for_ever(url: str, seed: int, acknowledge: Connection) -> None:
    """Stores session after session and sends the key of every page once it is stored. Meant to be killed."""
    store = PrefixStore(url, page_size=8)
    for session in range(seed * 100000, seed * 100000 + 100000):
        for key in put_chain(store, chain(3, session)):
            acknowledge.send(key)


def kill_a_writer(folder: Path, seed: int, seconds: float) -> dict[str, int]:
    """Kills a process (SIGKILL) so long after its first page, and opens the store again.

    Returns:
        counts: pages `acknowledged`; of those, how many are `lost`; pages that `verify` finds `damaged` and `whole`.
    """
    receive, send = _context().Pipe(duplex=False)
    process = _context().Process(target=write_for_ever, args=(str(folder), seed, send), daemon=True)
    process.start()
    send.close()
    acknowledged = [receive.recv()]
    time.sleep(seconds)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    try:
        while True:
            acknowledged.append(receive.recv())
    except (EOFError, OSError):
        # all that was sent has come; a message that was cut off acknowledges nothing
        receive.close()
    with PrefixStore(folder, page_size=8) as store:
        lost = sum(not store.backend.contains(key, "") for key in acknowledged)
        whole, damaged = store.verify()
    return {"acknowledged": len(acknowledged), "lost": lost, "damaged": len(damaged), "whole": whole}


def compete(url: str, seed: int, seconds: float, done: Connection, sessions: int = 40) -> None:
    """Reads, writes and now and then removes sessions that other processes do the same with; sends what happened."""
    store = PrefixStore(url, page_size=8)
    # on a busy machine it can take seconds to open one
    choose, end = random.Random(seed), time.time() + seconds
    counts = {"rounds": 0, "read": 0, "wrong": 0, "not_stored": 0, "removed": 0}
    while time.time() < end:
        pages = chain(choose.randrange(1, 5), choose.randrange(sessions))
        found = restored(store, ids_of(pages))
        counts["read"] += sum(page is not None for page in found)
        counts["wrong"] += sum(p is not None and not same(p, q) for p, q in zip(found, pages, strict=False))
        counts["not_stored"] += None in put_chain(store, pages)
        entries = list(store.entries()) if choose.random() < 0.05 else []
        if entries:
            victim = choose.choice(entries)
            store.backend.delete(victim.key, victim.parent)
            counts["removed"] += 1
        counts["rounds"] += 1
    done.send({**counts, "written": store.counts.written_pages, "failures": store.counts.failures})


def competitors(url: str, processes: int, seconds: float, patience: float = 600) -> dict[str, int]:
    """Runs `compete` in several processes at once; the sums of what they count, and how many `ended`."""
    running = []
    for seed in range(processes):
        receive, send = _context().Pipe(duplex=False)
        process = _context().Process(target=compete, args=(url, seed, seconds, send), daemon=True)
        process.start()
        send.close()
        running.append((process, receive))
    totals = {"processes": processes, "ended": 0}
    for process, receive in running:
        if receive.poll(seconds + patience):
            for name, count in receive.recv().items():
                totals[name] = totals.get(name, 0) + count
            process.join(patience)
        totals["ended"] += process.exitcode == 0
        process.kill()
    return totals


def write_beyond_the_disk(url: str) -> tuple[int, int, list[str]]:
    """Stores a page, and then two for which the system has no room.

    Returns:
        how many pages were stored, how many were not, and why, as far as a user was told.
    """
    receive, send = _context().Pipe(duplex=False)
    process = _context().Process(target=_write_beyond_the_disk, args=(url, send))
    process.start()
    result = receive.recv()
    process.join()
    return result


def _write_beyond_the_disk(url: str, done: Connection) -> None:
    import resource

    store = PrefixStore(url, page_size=8)
    keys = put_chain(store, chain(1))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        keys += put_chain(store, chain(2, seed=1, tokens=64))
    told = [reason for warning in said for reason in ("File too large",) if reason in str(warning.message)]
    done.send((sum(key is not None for key in keys), keys.count(None), told if len(told) == len(said) else said))


def _context() -> ForkServerContext:
    """Processes that begin with everything imported, and share nothing with this one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hf_kvcache.sequential.trials"])
    return context
