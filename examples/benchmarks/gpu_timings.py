"""The parts of `gpu.py` that time: kernels one by one, against a copy, SDPA and transformers' caches; whole steps."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from statistics import fmean, median
from typing import Any

import roofline
import torch
from gpu_bench import Bench, over
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_kvcache import compile_decode, new_cache, patch_model
from hf_kvcache.codecs.codebooks import cubic
from hf_kvcache.codecs.rotation import rotation
from hf_kvcache.kernels.code_attention import code_attention
from hf_kvcache.kernels.decode_attention import decode_attention
from hf_kvcache.kernels.encode_entries import encode_entries
from hf_kvcache.kernels.gated_retention import gated_retention
from hf_kvcache.kernels.ragged_attention import programs_of, ragged_code_attention, work_list
from hf_kvcache.kernels.select import select
from hf_kvcache.kernels.value_norm import value_norm
from hf_kvcache.kernels.window_scores import window_scores

# of an H200 at 8 x 32k: share of copy bandwidth by bits; and microseconds of 4 bits at 1 x 32k
GOALS = {4: 0.88, 3: 0.75, 2: 0.75}
SMALL_GOAL = 14
# scales that the codec tries
FACTORS = ((0.9, 1.0, 1.1), (0.92, 1.04))


def machine(bench: Bench) -> Iterator[dict[str, Any]]:
    """What a copy and a matrix product reach."""
    size = 1 << 12 if bench.rehearsal else 1 << 31
    source = torch.empty(size, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    seconds = bench.time(lambda _: target.copy_(source), [None])
    bench.copy_rate = 1.0 if seconds is None else 2 * size / seconds
    yield bench.row("copy, bytes a second", f"{size >> 10} KiB", seconds, 2 * size, value=seconds and bench.copy_rate)
    side = 64 if bench.rehearsal else 8192
    a = bench.draw(side, side)
    seconds = bench.time(lambda _: a @ a, [None])
    yield bench.row("product, TFLOP/s", f"{side}", seconds, value=seconds and 2 * side**3 / seconds / 1e12)


def decode(bench: Bench) -> Iterator[dict[str, Any]]:
    """One layer and one new token: codes, dense bfloat16, SDPA and FlashAttention on the same shapes."""
    heads, group, dim = bench.heads, bench.group, bench.dim
    for batch, tokens in bench.shapes:
        runs, size = batch * heads, f"{batch} x {tokens}"
        number = roofline.decode_attention(runs * tokens, dim, 2, runs, group, runs).least
        make = lambda b=batch, t=tokens: tuple(bench.draw(b, heads, n, dim) for n in (group, t, t))  # noqa: E731
        data = bench.copies(make, number)
        # the group folded into the rows, which is the best that SDPA can be given
        base = bench.time(lambda d: torch.nn.functional.scaled_dot_product_attention(*d), data)
        yield bench.row("SDPA bfloat16", size, base, number)
        if not bench.rehearsal:
            with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
                seconds = bench.time(lambda d: torch.nn.functional.scaled_dot_product_attention(*d), data)
            yield bench.row("FlashAttention bfloat16 (SDPA's)", size, seconds, number, **over(base, seconds))
        seconds = bench.time(lambda d: decode_attention(*d, scale=dim**-0.5), data)
        yield bench.row("dense bfloat16", size, seconds, number, **over(base, seconds))
        data = None
        for bits, kind in itertools.product((4, 3, 2), ("equal steps", "cubic")):
            number = roofline.code_attention(runs * tokens, dim, (bits, bits), runs, group, runs, bias=False).least

            def coded(runs=runs, tokens=tokens, batch=batch, bits=bits, kind=kind):
                pair = [bench.codes(runs * tokens, bits, kind) for _ in range(2)]
                return (bench.draw(batch, heads, group, dim, dtype=torch.float32), *pair)

            data = bench.copies(coded, number)
            seconds = bench.time(lambda d: code_attention(*d, scale=dim**-0.5), data)
            goal = GOALS[bits] if (batch, tokens) == (8, 32768) and kind == "equal steps" else None
            if (batch, tokens, bits, kind) == (1, 32768, 4, "equal steps"):
                goal = f"{SMALL_GOAL} microseconds"
            yield bench.row(f"{bits} bits, {kind}", size, seconds, number, goal=goal, **over(base, seconds))
            data = None


def ragged(bench: Bench) -> Iterator[dict[str, Any]]:
    """Equal entries, spread over the runs so that the longest holds 1, 2, 4, 8 or 16 times the mean."""
    heads, group, dim = bench.heads, bench.group, bench.dim
    batch, tokens = bench.shapes[-1]
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
        number = roofline.code_attention(total, dim, (4, 4), runs, group, runs, bias=False).least

        def coded(entries=total):
            pair = [bench.codes(entries, 4, "equal steps") for _ in range(2)]
            return (bench.draw(batch, heads, group, dim, dtype=torch.float32), *pair)

        call = lambda d, w=work, p=parts: ragged_code_attention(*d, w, p, scale=dim**-0.5)  # noqa: E731
        seconds = bench.time(call, bench.copies(coded, number))
        even = even or seconds
        yield bench.row(f"4 bits, longest run {spread} x the mean", f"{batch} x {tokens}", seconds, number,
                        goal="value <= 1.05", value=seconds and even and seconds / even)  # fmt: skip


def prompts(bench: Bench) -> Iterator[dict[str, Any]]:
    """What eviction and encoding add to the prefill of one layer, its attention itself, and retention."""
    heads, group, dim = bench.heads, bench.group, bench.dim
    hidden, window = heads * group * dim, min(64, bench.contexts[0])
    turned = rotation("hadamard", dim, 0, bench.device)
    books = {bits: (cubic(dim, bits),) * 2 for bits in GOALS}
    for tokens in bench.contexts:
        size = f"1 x {tokens}"

        def kv(tokens=tokens):
            return bench.draw(1, heads, tokens, dim)

        added: list[float | None] = []
        number = roofline.window_scores(heads, tokens, dim, 2, group, window).least
        data = bench.copies(lambda make=kv: (bench.draw(1, heads, group, window, dim), make()), number)
        added.append(bench.time(lambda d: window_scores(*d, scale=dim**-0.5), data))
        yield bench.row("window scores", size, added[-1], number)
        for norm, width in (("L2", dim), ("L1", hidden)):
            number = roofline.value_norm(heads, tokens, dim, 2, heads, group, width).least

            def valued(make=kv, width=width):
                return make(), bench.draw(heads, group, dim, width, dtype=torch.float32)

            seconds = bench.time(lambda d, gram=norm == "L2": value_norm(*d, gram), bench.copies(valued, number))
            added += [seconds] if norm == "L2" else []
            yield bench.row(f"value norm, {norm}", size, seconds, number)
        number = roofline.select(heads, tokens).least
        counts = torch.full((1, heads), tokens // 4, device=bench.device)
        data = bench.copies(lambda t=tokens: torch.rand(1, heads, t, device=bench.device), number)
        added.append(bench.time(lambda d, few=counts: select(d, few), data))
        yield bench.row("select", size, added[-1], number)
        owners = torch.arange(heads, device=bench.device).repeat_interleave(tokens)
        for bits in (4, 3, 2):
            number = roofline.encode_entries(heads * tokens, dim, (bits, bits), 2, gather=False, owned=True).least

            def whole(make=kv, owners=owners):
                key = make()
                return key, make(), None, owners.clone(), key.mean(2).flatten(0, 1)

            call = lambda d, own=books[bits]: encode_entries(*d, turned, own, FACTORS)  # noqa: E731
            seconds = bench.time(call, bench.copies(whole, number))
            goal = "50 microseconds" if tokens == 32768 else None
            yield bench.row(f"encode {bits} bits", size, seconds, number, goal=goal)
        number = roofline.encode_entries(heads * tokens // 4, dim, (4, 4), 2, gather=True, owned=True).least

        def kept(make=kv, tokens=tokens):
            key, index = make(), torch.arange(0, heads * tokens, 4, device=bench.device)
            return key, make(), index, index // tokens, key.mean(2).flatten(0, 1)

        call = lambda d: encode_entries(*d, turned, books[4], FACTORS)  # noqa: E731
        added.append(bench.time(call, bench.copies(kept, number)))
        yield bench.row("encode 4 bits, a quarter of the entries gathered", size, added[-1], number)
        data = bench.copies(lambda t=tokens: layer_of(bench, t), hidden * tokens * 2)
        prefill = bench.time(lambda d: attention_of_a_layer(bench, *d), data)
        del data
        yield bench.row("prefill attention and its projections", size, prefill)
        # window scores, L2 norm, selection and the gathered encoding
        total = sum(added) if prefill and all(added) else None
        yield bench.row("what eviction to codes adds to it", size, total, goal="value <= 0.01",
                        value=total and total / prefill)  # fmt: skip
        states = heads * group
        number = roofline.gated_retention(states, tokens, dim, dim, 2).least

        def gated(tokens=tokens, states=states):
            gates = torch.nn.functional.logsigmoid(bench.draw(1, states, tokens, dtype=torch.float32)) / 16
            return (*(bench.draw(1, states, tokens, dim) for _ in range(3)), gates)

        seconds = bench.time(lambda d: gated_retention(*d), bench.copies(gated, number))
        yield bench.row("gated retention", size, seconds, number, goal=0.5 if tokens >= 8192 else None)


def layer_of(bench: Bench, tokens: int) -> tuple[torch.Tensor, ...]:
    """The input of a layer's attention, and its projections: to query, key and value, one behind the other, and out."""
    hidden, one = bench.heads * bench.group * bench.dim, bench.heads * bench.dim
    into, out = (bench.draw(hidden, width) * hidden**-0.5 for width in (hidden + 2 * one, hidden))
    return bench.draw(1, tokens, hidden), into, out


def attention_of_a_layer(bench: Bench, hidden: torch.Tensor, into: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Over a whole prompt, without positions."""
    made = (hidden @ into).unflatten(2, (-1, bench.dim)).transpose(1, 2)
    query, key, value = made.split([bench.heads * bench.group, bench.heads, bench.heads], dim=1)
    seen = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    return seen.transpose(1, 2).flatten(2) @ out


def whole_steps(bench: Bench, model: Callable[[], Any], shapes: list[tuple[int, int]]) -> Iterator[dict[str, Any]]:
    """One token of a whole model with random weights: transformers' cache, ours dense, ours in codes; by graphs too.

    Args:
        model: makes one.
        shapes: (batch, tokens).
    """
    from transformers import DynamicCache

    made = model()
    config = made.config
    shape = (config.num_key_value_heads, config.head_dim)
    for batch, tokens in shapes:
        size, token = f"{batch} x {tokens}", torch.zeros(batch, 1, dtype=torch.long, device=bench.device)
        cache = DynamicCache()
        for layer in range(config.num_hidden_layers):
            cache.update(*(bench.draw(batch, shape[0], tokens, shape[1]) for _ in range(2)), layer)
        base = bench.time(lambda c, t=token: made(t, past_key_values=c), [cache], graph=False)
        yield bench.row("a token, DynamicCache", size, base)
        del cache
        for method, graph in ((None, False), (None, True), ("turboquant", True), ("adakv+turboquant", True)):
            options: dict[str, Any] = {"budget": 0.25} if method and "adakv" in method else {}
            if method and bench.rehearsal:
                # or it would never come to a flush
                options["block_size"] = 12
            patch_model(made, method, **options)
            if graph:
                compile_decode(made)
            cache = filled(made, bench, batch, tokens, shape)
            # so many that new tokens are encoded and the graph is recorded anew: the mean has that, the median not
            steps = None if method is None else 14 if bench.rehearsal else 160
            times = bench.times(lambda c, t=token: made(t, past_key_values=c), [cache], graph=False, repetitions=steps)
            what = f"a token, {method or 'dense'}{', as a graph' if graph else ''}"
            seconds = times and median(times)
            yield bench.row(what, size, seconds, value=base and seconds and base / seconds)
            if method:
                assert all(len(layer.segments) == 1 and layer.segments[0].seen > tokens for layer in cache.layers)
                average = times and fmean(times)
                yield bench.row(f"{what}, with its flushes", size, average, value=base and average and base / average)
            if (method, graph) == (None, True):
                base = seconds
            del cache
        patch_model(made, None)


def filled(model: Any, bench: Bench, batch: int, tokens: int, shape: tuple[int, int]) -> Any:
    """A cache of a patched model as a prompt of random keys and values leaves it; a quarter stays where it evicts."""
    from hf_kvcache.layers import KVCacheLayer
    from hf_kvcache.segment import Segment

    cache = new_cache(model)
    for layer in cache.layers:
        assert isinstance(layer, KVCacheLayer)
        settings = layer.settings
        key, value = (bench.draw(batch, shape[0], tokens, shape[1]) for _ in range(2))
        keep = None
        if settings.policy is not None:
            # heads keep 1, 2, 3 ... parts of a quarter of all
            share = torch.arange(1, shape[0] + 1, device=bench.device).float()
            share = 0.25 * share / share.mean()
            keep = torch.rand(batch, shape[0], tokens, device=bench.device) < share[:, None]
        layer.segments = [Segment.seal(settings.codec, settings.store, key, value, keep)]
        layer.tail.append(key[:, :, :1], value[:, :, :1])
        layer.seen, layer.is_initialized = tokens + 1, True
    return cache
