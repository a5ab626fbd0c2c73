"""Trials of the store of `sequential`: nothing lost, nothing wrong, nothing believed that is not a page.

python examples/benchmarks/sequential_robustness.py kill         # 200 writers killed with SIGKILL
python examples/benchmarks/sequential_robustness.py processes    # 8 processes read, write and remove for 2 minutes
python examples/benchmarks/sequential_robustness.py flips        # every bit of a page of a real shape, one at a time
python examples/benchmarks/sequential_robustness.py fuzz         # 1,000,000 tampered pages
python examples/benchmarks/sequential_robustness.py dedup        # N sessions over one prefix: formula and folder
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from common import add_results

from hf_kvcache.sequential import pagefile, record
from hf_kvcache.sequential.backends import Entry
from hf_kvcache.sequential.identity import page_key
from hf_kvcache.sequential.packing import PageError
from hf_kvcache.sequential.page import Context, Geometry, Page
from hf_kvcache.sequential.store import PrefixStore
from hf_kvcache.sequential.trials import (
    CODECS,
    CONTEXT,
    IDENTITY,
    chain,
    competitors,
    kill_a_writer,
    put_chain,
    random_page,
    tampered,
)


def kill(count: int, folder: Path) -> dict[str, Any]:
    """Kills `count` writers, each up to a fifth of a second after its first page, on one and the same store."""
    choose, totals = random.Random(0), {"kills": count, "acknowledged": 0, "lost": 0, "damaged": 0}
    for seed in range(count):
        found = kill_a_writer(folder, seed, choose.uniform(0, 0.2))
        for name in ("acknowledged", "lost", "damaged"):
            totals[name] += found[name]
    return {**totals, "whole_at_the_end": found["whole"]}


def processes(count: int, seconds: float, folder: Path) -> dict[str, Any]:
    """`count` processes for so long; then every page is read."""
    totals = competitors(str(folder), count, seconds)
    with PrefixStore(folder, page_size=8) as store:
        whole, damaged = store.verify()
    return {**totals, "seconds": seconds, "whole_at_the_end": whole, "damaged": len(damaged)}


def file_of(page: Page, context: Context) -> tuple[bytes, str]:
    key = page_key(IDENTITY.root, page.ids)
    entry = Entry(key, IDENTITY.root, page.ids, page.start, "lossless", 0, 1.0)
    return record.write(page, CODECS["lossless"], context, entry).data, key


def flips(tokens: int) -> dict[str, Any]:
    """Flips every bit of a page of four tokens of SmolLM2's shape in bfloat16."""
    geometry = Geometry(tuple(range(30)), (3,) * 30, (64,) * 30, torch.bfloat16)
    data, _ = file_of(random_page(0, tokens, 0, geometry), Context(geometry))
    found, damaged = 0, bytearray(data)
    for bit in range(8 * len(data)):
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            pagefile.load(damaged, only=())
        except PageError:
            found += 1
        damaged[bit // 8] ^= 1 << bit % 8
    return {"page_bytes": len(data), "flips": 8 * len(data), "detected": found}


def fuzz(count: int) -> dict[str, Any]:
    """Tampered pages, nine of ten with a right checksum. Anything but a page or a PageError would end this."""
    page, context = random_page(tokens=3), CONTEXT
    data, key = file_of(page, context)
    accepted = refused = wrong = 0
    for changed in tampered(data, count):
        try:
            restored = record.read(changed, key, IDENTITY.root, CODECS, context, b"")
        except PageError:
            refused += 1
            continue
        accepted += 1
        shapes = [tuple(tensor.shape) for tensor in restored.keys]
        wrong += shapes != [tuple(tensor.shape) for tensor in page.keys] or bool((restored.ids != page.ids).any())
    return {"inputs": count, "refused": refused, "accepted": accepted, "of_another_shape_or_text": wrong}


def dedup(folder: Path) -> dict[str, Any]:
    """Twenty sessions of 3 pages each over one prefix of 10."""
    sessions, shared, own = 20, 10, 3
    store = PrefixStore(folder, page_size=8)
    last = put_chain(store, chain(shared))[-1]
    page = store.backend.total() / shared
    for seed in range(1, sessions + 1):
        put_chain(store, chain(shared))
        parent = last
        for following in chain(own, seed, behind=shared):
            parent = store.put(following, parent, CODECS["lossless"], CONTEXT)
    measured = sum(path.stat().st_size for path in folder.glob("pages/*/*"))
    formula = page * (shared + sessions * own)
    alone = page * sessions * (shared + own)
    return {
        "sessions": sessions,
        "shared_pages": shared,
        "own_pages": own,
        "bytes_by_formula": round(formula),
        "bytes_on_disk": measured,
        "difference": measured / formula - 1,
        "dedup_factor": alone / measured,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("kill", "processes", "flips", "fuzz", "dedup"))
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--tokens", type=int, default=1, help="of the page of `flips`")
    options = parser.parse_args()
    began = time.perf_counter()
    with TemporaryDirectory() as scratch:
        folder = Path(scratch) / "store"
        if options.part == "kill":
            found = kill(options.kills, folder)
        elif options.part == "processes":
            found = processes(options.processes, options.seconds, folder)
        elif options.part == "flips":
            found = flips(options.tokens)
        elif options.part == "fuzz":
            found = fuzz(options.inputs)
        else:
            found = dedup(folder)
    text = "; ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in found.items()
    )
    add_results(
        "sequential_robustness", {"part": options.part, "found": text, "wall_s": time.perf_counter() - began}, ("part",)
    )


if __name__ == "__main__":
    main()
