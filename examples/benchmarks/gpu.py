"""Ten minutes on a CUDA machine: whether every kernel is right there, and how fast it is against what a copy takes.

    python examples/benchmarks/gpu.py              the whole run; writes results/gpu.csv
    python examples/benchmarks/gpu.py --rehearse   on a CPU, by the interpreter, at tiny sizes: does it run?

In order, so that a run that is cut short has answered the first questions first:

1. the machine: clocks, what a copy reaches, what a matrix product reaches
2. correctness: the assembly against its twin in PyTorch on the same codes, float64 as judge, memory poisoned with NaN
3. decode attention of one layer (Llama-3.1-8B's shape by default): 4, 3 and 2 bits, dense bfloat16 of ours, SDPA
4. ragged heads: the same entries, spread more and more unevenly
5. scoring, norms, selection
6. one token of transformers' DynamicCache, attention alone, against ours

Times are medians of CUDA graph replays over copies of the data that together do not fit in the second-level cache. The
share of copy is the bytes that the kernel must read, by the rate of the copy of step 1. Where there is a goal for the
H200, the row has it.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

if "--rehearse" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["HF_KVCACHE_BACKEND"] = "triton"

import torch
from common import write_results
from torch import Tensor

from hf_kvcache.codecs.codebooks import cubic
from hf_kvcache.kernels.code_attention import code_attention, levels_of
from hf_kvcache.kernels.decode_attention import decode_attention
from hf_kvcache.kernels.ragged_attention import programs_of, ragged_code_attention, work_list
from hf_kvcache.kernels.select import select
from hf_kvcache.kernels.value_norm import value_norm
from hf_kvcache.kernels.window_scores import window_scores

REPETITIONS = 30
# all copies of the data together exceed the second-level cache of every GPU
CACHE = 256 << 20
ALLOWED = 2e-3
# of an H200 at 8 x 32k: share of copy bandwidth by bits
GOALS = {4: 0.88, 3: 0.75, 2: 0.75}


@dataclass
class Bench:
    """Where and how to time."""

    device: torch.device
    rehearsal: bool
    copy_rate: float = 1.0

    def time(self, call: Callable[[Any], Any], copies: list[Any]) -> float | None:
        """Median seconds of one call, over all copies in turn; None in a rehearsal, which calls it once."""
        if self.rehearsal:
            call(copies[0])
            return None
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for data in copies[:2]:
                call(data)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for data in copies:
                call(data)
        graph.replay()
        times = []
        for _ in range(REPETITIONS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3 / len(copies))
        return sorted(times)[len(times) // 2]

    def row(self, what: str, size: str, seconds: float | None, number: float, **more: Any) -> dict[str, Any]:
        """A line of the table; `number` are the bytes that must be moved."""
        share = None if seconds is None else number / seconds / self.copy_rate
        made = {
            "what": what,
            "size": size,
            "microseconds": None if seconds is None else seconds * 1e6,
            "bytes": number,
            "share of copy": share,
            "goal": None,
            "over bfloat16 SDPA": None,
            "error": None,
        } | more
        print(*(f"{name} {value}" for name, value in made.items() if value is not None), sep=" | ", flush=True)
        return made


def random_codes(entries: int, dim: int, bits: int, device: torch.device, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, scales, levels): random bytes are random codes of any width."""
    packed = torch.randint(0, 256, (entries, dim * bits // 8), dtype=torch.uint8, device=device)
    scales = (torch.rand(entries, device=device) * 0.2 + 0.05).to(torch.float16)
    steps = torch.arange(2**bits, dtype=torch.float64) - (2**bits - 1) / 2
    return packed, scales, cubic(dim, bits) if kind == "cubic" else steps


def copies_of(make: Callable[[], Any], number: float, bench: Bench) -> list[Any]:
    """As many copies of some data as exceed the cache."""
    return [make() for _ in range(1 if bench.rehearsal else int(CACHE // number) + 2)]


def machine(bench: Bench, size: int) -> Iterator[dict[str, Any]]:
    """What a copy and a matrix product reach."""
    source = torch.empty(size, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    seconds = bench.time(lambda _: target.copy_(source), [None])
    bench.copy_rate = 1.0 if seconds is None else 2 * size / seconds
    yield bench.row("copy", f"{size >> 20} MiB", seconds, 2 * size, error=None)
    side = 64 if bench.rehearsal else 8192
    a = torch.randn(side, side, device=bench.device, dtype=torch.bfloat16)
    seconds = bench.time(lambda _: a @ a, [None])
    rate = None if seconds is None else 2 * side**3 / seconds / 1e12
    yield bench.row("matrix product (TFLOP/s in the last column)", f"{side}", seconds, 6 * side**2, error=rate)


def dense_oracle(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    scores = query.double() @ key.double().mT * scale
    return scores.softmax(-1) @ value.double()


def correctness(bench: Bench) -> Iterator[dict[str, Any]]:
    """Every kernel against float64 on the same codes; stops the run where one is wrong."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills fresh memory with NaN
    device = bench.device
    sizes = [(64, 3, 70)] if bench.rehearsal else [(128, 4, 5000), (64, 3, 3001), (128, 12, 700), (256, 8, 333)]
    for (dim, queries, tokens), bits, kind in itertools.product(sizes, (4, 3, 2), ("equal steps", "cubic")):
        key, value = (random_codes(2 * tokens, dim, bits, device, kind) for _ in range(2))
        query = torch.randn(1, 2, queries, dim, device=device)
        bias = torch.randn(1, 2, queries, device=device)
        out, _ = code_attention(query, key, value, bias, scale=dim**-0.5)
        dense = [
            levels_of(codes, levels.to(device)).double() * scales[:, None] for codes, scales, levels in (key, value)
        ]
        scores = torch.einsum("rhmd,htd->rhmt", query.double(), dense[0].view(2, tokens, dim))
        weights = ((scores + bias[..., None]) * dim**-0.5).softmax(-1)
        exact = torch.einsum("rhmt,htd->rhmd", weights, dense[1].view(2, tokens, dim))
        yield judged(bench, f"{bits} bits, {kind}", f"head_dim {dim}, {queries} queries, {tokens} tokens", out, exact)
        if bits == 4:
            continue
        half = tokens // 3
        ends = torch.tensor([half, 2 * tokens])
        work, parts = work_list(torch.arange(2), torch.tensor([0, half]), ends, 2, programs_of(device))
        out, _ = ragged_code_attention(query, key, value, work.to(device), parts.to(device), bias, scale=dim**-0.5)
        for run, entries in enumerate((slice(0, half), slice(half, 2 * tokens))):
            exact = dense_oracle(query[0, run], dense[0][entries], dense[1][entries], dim**-0.5)
            size = f"head_dim {dim}, {queries} queries, run {run} of 2"
            yield judged(bench, f"{bits} bits, {kind}, ragged", size, out[0, run], exact)
    for dim, queries, tokens in sizes:
        query, key, value = (
            torch.randn(1, 2, n, dim, device=device, dtype=torch.bfloat16) for n in (queries, tokens, tokens)
        )
        out, _ = decode_attention(query, key, value, scale=dim**-0.5)
        # bfloat16 has three digits
        exact = dense_oracle(query, key, value, dim**-0.5)
        yield judged(bench, "dense bfloat16", f"head_dim {dim}, {queries} queries", out, exact, allowed=1e-2)
    torch.use_deterministic_algorithms(False)


def judged(
    bench: Bench, what: str, size: str, actual: Tensor, exact: Tensor, allowed: float = ALLOWED
) -> dict[str, Any]:
    error = float((actual.double() - exact).norm() / exact.norm())
    if not error <= allowed:
        raise SystemExit(
            f"WRONG: {what}, {size}: relative error {error:.1e}, allowed are {allowed:.0e}; nothing was timed"
        )
    return bench.row(f"correct: {what}", size, None, 0, error=error)


def decode(bench: Bench, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One layer and one new token: codes, dense bfloat16 and SDPA on the same shapes."""
    heads, group, dim = arguments.kv_heads, arguments.group, arguments.head_dim
    for batch, tokens in arguments.shapes:
        runs, size = batch * heads, f"{batch} x {tokens}"
        number = runs * tokens * dim * 4

        def dense(runs=runs, tokens=tokens, batch=batch):
            pair = (torch.randn(batch, heads, tokens, dim, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
            return (torch.randn(batch, heads, group, dim, device=bench.device, dtype=torch.bfloat16), *pair)

        data = copies_of(dense, number, bench)
        # the group folded into the rows, which is the best that SDPA can be given
        base = bench.time(lambda d: torch.nn.functional.scaled_dot_product_attention(*d), data)
        yield bench.row("SDPA bfloat16", size, base, number)
        seconds = bench.time(lambda d: decode_attention(*d, scale=dim**-0.5), data)
        yield bench.row("dense bfloat16", size, seconds, number, **over(base, seconds))
        data = None
        for bits, kind in itertools.product((4, 3, 2), ("equal steps", "cubic")):
            number = runs * tokens * (dim * bits / 4 + 4)

            def coded(runs=runs, tokens=tokens, batch=batch, bits=bits, kind=kind):
                pair = [random_codes(runs * tokens, dim, bits, bench.device, kind) for _ in range(2)]
                return (torch.randn(batch, heads, group, dim, device=bench.device), *pair)

            data = copies_of(coded, number, bench)
            seconds = bench.time(lambda d: code_attention(*d, scale=dim**-0.5), data)
            goal = GOALS[bits] if (batch, tokens) == (8, 32768) and kind == "equal steps" else None
            yield bench.row(f"{bits} bits, {kind}", size, seconds, number, goal=goal, **over(base, seconds))
            data = None


def over(base: float | None, seconds: float | None) -> dict[str, float | None]:
    return {"over bfloat16 SDPA": base / seconds if base and seconds else None}


def ragged(bench: Bench, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Equal entries, spread over the runs so that the longest holds 1, 2, 4, 8 or 16 times the mean."""
    heads, group, dim = arguments.kv_heads, arguments.group, arguments.head_dim
    batch, tokens = arguments.shapes[-1]
    runs = batch * heads
    even = None
    for spread in (1, 2, 4, 8, 16):
        longest = min(spread, runs) * tokens
        rest = (runs * tokens - longest) // max(1, runs - 1)
        lengths = torch.tensor([longest] + [rest] * (runs - 1))
        ends = lengths.cumsum(0)
        work, parts = (
            tensor.to(bench.device)
            for tensor in work_list(torch.arange(runs), ends - lengths, ends, runs, programs_of(bench.device))
        )
        total = int(lengths.sum())
        number = total * (dim + 4)

        def coded(entries=total):
            pair = [random_codes(entries, dim, 4, bench.device, "equal steps") for _ in range(2)]
            return (torch.randn(batch, heads, group, dim, device=bench.device), *pair)

        call = lambda d, w=work, p=parts: ragged_code_attention(*d, w, p, scale=dim**-0.5)  # noqa: E731
        seconds = bench.time(call, copies_of(coded, number, bench))
        even = even or seconds
        share = None if not seconds else seconds / even
        yield bench.row(f"4 bits, longest run {spread} x the mean", f"{batch} x {tokens}", seconds, number,
                        goal=1.05, error=share)  # fmt: skip


def eviction(bench: Bench, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What eviction adds to the prefill of one layer."""
    heads, group, dim = arguments.kv_heads, arguments.group, arguments.head_dim
    hidden, window = heads * group * dim, min(64, arguments.contexts[0])
    for tokens in arguments.contexts:
        key, value = (torch.randn(1, heads, tokens, dim, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
        query = torch.randn(1, heads, group, window, dim, device=bench.device, dtype=torch.bfloat16)
        weight = torch.randn(heads, group, dim, hidden, device=bench.device)
        gram = weight @ weight.mT
        score = torch.rand(1, heads, tokens, device=bench.device)
        counts = torch.full((1, heads), tokens // 4, device=bench.device)
        number = key.nbytes
        yield bench.row(
            "window scores",
            f"1 x {tokens}",
            bench.time(lambda d: window_scores(*d, scale=dim**-0.5), [(query, key)]),
            2 * number,
        )
        for norm, matrix in (("L2", gram), ("L1", weight)):
            seconds = bench.time(lambda d: value_norm(*d), [(value, matrix, matrix is gram)])
            yield bench.row(f"value norm, {norm}", f"1 x {tokens}", seconds, number)
        seconds = bench.time(lambda d: select(*d), [(score, counts)])
        yield bench.row("select", f"1 x {tokens}", seconds, score.nbytes)


def dynamic_cache(bench: Bench, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """transformers' default: the cache grows by one token (a copy of it all), then SDPA with repeated heads."""
    from transformers import DynamicCache

    heads, group, dim = arguments.kv_heads, arguments.group, arguments.head_dim
    batch, tokens = arguments.shapes[0]
    key, value = (torch.randn(batch, heads, tokens, dim, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
    query = torch.randn(batch, heads * group, 1, dim, device=bench.device, dtype=torch.bfloat16)
    new = torch.randn(batch, heads, 1, dim, device=bench.device, dtype=torch.bfloat16)

    def step(_):
        cache = DynamicCache()
        cache.update(key, value, 0)
        held = cache.update(new, new, 0)
        return torch.nn.functional.scaled_dot_product_attention(query, *held, enable_gqa=True)

    yield bench.row("DynamicCache, one token", f"{batch} x {tokens}", bench.time(step, [None]), 2 * key.nbytes)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--group", type=int, default=4, help="query heads of a KV head")
    parser.add_argument("--head-dim", type=int, default=128)
    arguments = parser.parse_args()
    if not torch.cuda.is_available() and not arguments.rehearse:
        print("this benchmark needs a CUDA device, and torch sees none; try --rehearse to see whether it would run")
        return 2
    if arguments.rehearse:
        arguments.kv_heads, arguments.group, arguments.head_dim = 2, 2, 64
        arguments.shapes, arguments.contexts = [(1, 130)], [70]
        bench = Bench(torch.device("cpu"), rehearsal=True)
    else:
        arguments.shapes = [(1, 8192), (1, 32768), (1, 131072), (8, 8192), (32, 8192), (8, 32768)]
        arguments.contexts = [8192, 32768, 131072]
        bench = Bench(torch.device("cuda"), rehearsal=False)
    torch.manual_seed(0)
    rows = list(machine(bench, 1 << 12 if arguments.rehearse else 1 << 31))
    with torch.no_grad():
        rows += correctness(bench)
        for part in (decode, ragged, eviction, dynamic_cache):
            rows += part(bench, arguments)
    if arguments.rehearse:
        print(f"{len(rows)} rows; nothing was measured and nothing is written")
        return 0
    properties = torch.cuda.get_device_properties(bench.device)
    about = {"device": properties.name, "multiprocessors": properties.multi_processor_count}
    write_results("gpu", [row | about for row in rows])
    return 0


if __name__ == "__main__":
    sys.exit(main())
