"""What the parts of `gpu.py` share: timing by graph replay over data that no cache holds, and lines of its table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from hf_kvcache.codecs.codebooks import cubic

REPETITIONS = 30
# all copies of the data together exceed the second-level cache of every GPU
CACHE = 256 << 20


@dataclass
class Bench:
    """Where and how to time.

    Args:
        device: of all data.
        rehearsal: whether everything is called once, and nothing timed.
        heads, group, dim: of a layer: KV heads, query heads of each, and the head dimension.
        shapes: (batch, tokens) of decoding.
        contexts: tokens of prompts.
        copy_rate: bytes a second, found by the first part.
    """

    device: torch.device
    rehearsal: bool
    heads: int
    group: int
    dim: int
    shapes: list[tuple[int, int]]
    contexts: list[int]
    copy_rate: float = 1.0

    def time(self, call: Callable[[Any], Any], copies: list[Any], graph: bool = True) -> float | None:
        """Median seconds of one call, over all copies in turn; None in a rehearsal, which calls it once."""
        times = self.times(call, copies, graph)
        return None if times is None else median(times)

    def times(
        self, call: Callable[[Any], Any], copies: list[Any], graph: bool = True, repetitions: int | None = None
    ) -> list[float] | None:
        """Seconds of one call, of every repetition; None in a rehearsal.

        Args:
            call: what is timed, with one copy of its data.
            copies: of the data.
            graph: replay a CUDA graph; False for what cannot be recorded, whose launches count then.
            repetitions: how often, where it matters; a rehearsal calls it as often.
        """
        if self.rehearsal:
            for _ in range(repetitions or 1):
                call(copies[0])
            return None

        def all_of_them() -> None:
            for data in copies:
                call(data)

        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            all_of_them()
        torch.cuda.current_stream().wait_stream(stream)
        run: Callable[[], Any] = all_of_them
        if graph:
            recorded = torch.cuda.CUDAGraph()
            with torch.cuda.graph(recorded):
                all_of_them()
            run = recorded.replay
        run()
        times = []
        for _ in range(repetitions or REPETITIONS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3 / len(copies))
        return times

    def row(self, what: str, size: str, seconds: float | None, number: float = 0, **more: Any) -> dict[str, Any]:
        """A line of the table; `number` are the bytes that must be moved at least."""
        share = None if seconds is None or not number else number / seconds / self.copy_rate
        made = {
            "what": what,
            "size": size,
            "microseconds": None if seconds is None else seconds * 1e6,
            "bytes": int(number) or None,
            "share of copy": share,
            "goal": None,
            "over bfloat16 SDPA": None,
            "value": None,
        } | more
        print(*(f"{name} {value}" for name, value in made.items() if value is not None), sep=" | ", flush=True)
        return made

    def copies(self, make: Callable[[], Any], number: float) -> list[Any]:
        """As many copies of some data, of `number` bytes each, as exceed the cache."""
        return [make() for _ in range(1 if self.rehearsal else int(CACHE // number) + 2)]

    def draw(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=dtype)

    def codes(self, entries: int, bits: int, kind: str, dim: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(codes, scales, levels): random bytes are random codes of any width."""
        dim = dim or self.dim
        packed = torch.randint(0, 256, (entries, dim * bits // 8), dtype=torch.uint8, device=self.device)
        scales = (torch.rand(entries, device=self.device) * 0.2 + 0.05).to(torch.float16)
        steps = torch.arange(2**bits, dtype=torch.float64) - (2**bits - 1) / 2
        return packed, scales, cubic(dim, bits) if kind == "cubic" else steps


def over(base: float | None, seconds: float | None) -> dict[str, float | None]:
    """How many times faster than the base, where both were timed."""
    return {"over bfloat16 SDPA": base / seconds if base and seconds else None}
