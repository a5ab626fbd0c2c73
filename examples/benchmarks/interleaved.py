"""Times several patched copies of one model against the unpatched one, step by step in turn.

On a shared machine the speed of a processor changes within seconds, so nothing is compared with what was measured a
minute earlier: after every repetition's prefills the copies decode in turn, a few steps at a time, and the ratio to the
default's steps of the same round is taken. The first step of each turn does not count: it finds the caches of the
processor full of what the others read. The copies share their parameters.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from hf_kvcache.measure import cache_bytes

DEFAULT = "default"
# decode steps of a copy in a row
TURN = 5


@dataclass
class Timing:
    """Ratios of one copy to the default, more is faster; one number a repetition.

    Attributes:
        prefill: of the prefill.
        decode: median over the rounds of a repetition.
        own: what `clock` counted in the prefill, over the rest of it.
        kv_bytes: held right after a prefill.
    """

    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    own: list[float] = field(default_factory=list)
    kv_bytes: int = 0

    def row(self) -> dict[str, Any]:
        """Columns of a results file."""
        return {
            "prefill_speedup": median(self.prefill),
            "decode_speedup": median(self.decode),
            "decode_speedup_min": min(self.decode),
            "decode_speedup_max": max(self.decode),
            "repetitions": len(self.decode),
        }


def twin(model: nn.Module) -> nn.Module:
    """A copy of a model that can be patched on its own and has the same parameters in the same memory."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


@torch.no_grad()
def compare(
    copies: Mapping[str, nn.Module], ids: Tensor, repetitions: int, steps: int, clock: Callable[[], float] = float
) -> dict[str, Timing]:
    """Times every copy on a prompt `ids` `[1, T]` and `steps` greedy steps after it.

    Args:
        copies: models by name; the one named `DEFAULT` is what the others are compared with.
        ids, repetitions, steps: the prompt, how often it is read, and how many steps follow each time.
        clock: seconds that some part of the work has taken so far.
    """
    names = list(copies)
    timings = {name: Timing() for name in names}
    for repetition in range(repetitions):
        # nobody is always the first
        names = names[1:] + names[:1] if repetition else names
        outputs, prefill = {}, {}
        for name in names:
            before = clock()
            prefill[name], outputs[name] = _timed(copies[name], ids, None)
            own = clock() - before
            timings[name].own.append(own / (prefill[name] - own))
            timings[name].kv_bytes = cache_bytes(outputs[name].past_key_values)
        rounds: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(-(-steps // TURN)):
            seconds = {}
            for name in names:
                turn = []
                for _ in range(TURN):
                    last = outputs[name]
                    token = last.logits[:, -1:].argmax(-1)
                    step, outputs[name] = _timed(copies[name], token, last.past_key_values)
                    turn.append(step)
                seconds[name] = median(turn[1:])
            for name in names:
                rounds[name].append(seconds[DEFAULT] / seconds[name])
        for name in names:
            timings[name].prefill.append(prefill[DEFAULT] / prefill[name])
            timings[name].decode.append(median(rounds[name]))
    return timings


def _timed(model: nn.Module, ids: Tensor, cache: Any) -> tuple[float, Any]:
    start = time.perf_counter()
    out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return time.perf_counter() - start, out
