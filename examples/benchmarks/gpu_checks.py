"""The part of `gpu.py` that checks every kernel against float64 before anything is timed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from gpu_bench import Bench
from torch import Tensor

from hf_kvcache.codecs.codebooks import cubic
from hf_kvcache.codecs.rotation import rotation
from hf_kvcache.kernels.code_attention import code_attention, levels_of
from hf_kvcache.kernels.decode_attention import decode_attention
from hf_kvcache.kernels.encode_entries import encode_entries
from hf_kvcache.kernels.gated_retention import gated_retention
from hf_kvcache.kernels.merge_states import merge_states
from hf_kvcache.kernels.prepare_query import prepare_query
from hf_kvcache.kernels.ragged_attention import programs_of, ragged_code_attention, work_list
from hf_kvcache.kernels.select import select
from hf_kvcache.kernels.value_norm import value_norm
from hf_kvcache.kernels.window_scores import window_scores

# relative error that codes may add, and that the three digits of bfloat16 may
ALLOWED, ROUNDED = 2e-3, 1e-2
# squared error of codes of Gaussian keys, relative to their square: what the codec has on a CPU, and a twentieth
ENCODED = {4: 0.0081 * 1.05, 3: 0.0318 * 1.05, 2: 0.1144 * 1.05}


def correctness(bench: Bench) -> Iterator[dict[str, Any]]:
    """Every kernel against float64 on the same data; stops the run where one is wrong."""
    # fills fresh memory with NaN
    torch.use_deterministic_algorithms(True, warn_only=True)
    sizes = [(64, 3, 70)] if bench.rehearsal else [(128, 4, 5000), (64, 3, 3001), (128, 12, 700), (256, 8, 333)]
    for size in sizes:
        for bits, kind in itertools.product((4, 3, 2), ("equal steps", "cubic")):
            yield from codes(bench, size, bits, kind)
        yield from dense(bench, size)
    yield from preparing(bench)
    yield from encoding(bench)
    for dtype in (torch.bfloat16, torch.float16):
        yield from retention(bench, dtype)
    yield from eviction(bench)
    torch.use_deterministic_algorithms(False)


def judged(bench: Bench, what: str, size: str, actual: Tensor, exact: Tensor, allowed: float) -> dict[str, Any]:
    error = float((actual.double() - exact).norm() / exact.norm())
    if not error <= allowed:
        raise SystemExit(
            f"WRONG: {what}, {size}: relative error {error:.1e}, allowed are {allowed:.0e}; nothing was timed"
        )
    return bench.row(f"correct: {what}", size, None, value=error)


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float, bias: float | Tensor = 0.0) -> Tensor:
    """In float64."""
    scores = (query.double() @ key.double().mT + bias) * scale
    return scores.softmax(-1) @ value.double()


def codes(bench: Bench, size: tuple[int, int, int], bits: int, kind: str) -> Iterator[dict[str, Any]]:
    """Attention over codes, with assembly and without, and of runs of unequal length."""
    from hf_kvcache.kernels.triton_ops import code_attention as kernels

    dim, queries, tokens = size
    device, scale = bench.device, dim**-0.5
    key, value = (bench.codes(2 * tokens, bits, kind, dim) for _ in range(2))
    query, bias = (bench.draw(1, 2, queries, *rest, dtype=torch.float32) for rest in ((dim,), ()))
    k, v = (levels_of(codes, book.to(device)).double() * scales[:, None] for codes, scales, book in (key, value))
    what, told = f"{bits} bits, {kind}", f"head_dim {dim}, {queries} queries, {tokens} tokens"
    out, _ = code_attention(query, key, value, bias, scale=scale)
    exact = attend(query, k.view(2, tokens, dim), v.view(2, tokens, dim), scale, bias[..., None].double())
    yield judged(bench, what, told, out, exact, ALLOWED)
    if kernels.ASSEMBLY:
        kernels.ASSEMBLY = False
        plain, _ = code_attention(query, key, value, bias, scale=scale)
        kernels.ASSEMBLY = True
        yield judged(bench, f"{what}, assembly as plain Triton", told, out, plain.double(), 1e-5)
    half = tokens // 3
    ends = torch.tensor([half, 2 * tokens])
    work, parts = work_list(torch.arange(2), torch.tensor([0, half]), ends, 2, programs_of(device))
    out, _ = ragged_code_attention(query, key, value, work.to(device), parts.to(device), bias, scale=scale)
    for run, some in enumerate((slice(0, half), slice(half, 2 * tokens))):
        exact = attend(query[0, run], k[some], v[some], scale, bias[0, run, :, None].double())
        yield judged(bench, f"{what}, ragged", f"{told}, run {run} of 2", out[0, run], exact, ALLOWED)


def dense(bench: Bench, size: tuple[int, int, int]) -> Iterator[dict[str, Any]]:
    """Attention over bfloat16, and the joining of two results."""
    dim, queries, tokens = size
    query, key, value = (bench.draw(1, 2, n, dim) for n in (queries, tokens, tokens))
    told = f"head_dim {dim}, {queries} queries, {tokens} tokens"
    exact = attend(query, key, value, dim**-0.5)
    out, _ = decode_attention(query, key, value, scale=dim**-0.5)
    yield judged(bench, "dense bfloat16", told, out, exact, ROUNDED)
    first, second = (
        decode_attention(query, key[:, :, some], value[:, :, some], scale=dim**-0.5)
        for some in (slice(0, tokens // 3), slice(tokens // 3, tokens))
    )
    yield judged(bench, "merge_states", told, merge_states(*first, *second)[0], exact, ROUNDED)


def preparing(bench: Bench) -> Iterator[dict[str, Any]]:
    """The query of codes, rotated, and its products with means."""
    dim = 128
    query, mean = bench.draw(1, 2, 5, dim), bench.draw(2, dim)
    turn = rotation("hadamard", dim, 0, bench.device)
    turned, shift = prepare_query(query, turn, mean)
    yield judged(bench, "prepare_query", f"head_dim {dim}", turned, query.double() @ turn.double(), 1e-5)
    exact = (query.double() @ mean.double()[None, :, :, None])[..., 0]
    yield judged(bench, "prepare_query, means", f"head_dim {dim}", shift, exact, 1e-5)


def encoding(bench: Bench) -> Iterator[dict[str, Any]]:
    """The codes of Gaussian keys and values lose what the codec promises: of a prompt in one piece, and of chosen
    entries of several owners whose mean is removed."""
    for dim, bits in itertools.product((128,) if bench.rehearsal else (128, 64), (4, 3, 2)):
        tokens = 40 if bench.rehearsal else 3001
        x, turned, book = bench.draw(1, 2, tokens, dim), rotation("hadamard", dim, 0, bench.device), cubic(dim, bits)
        mean = 3 * bench.draw(2, dim)
        shifted = x + mean[None, :, None]
        index = torch.arange(0, 2 * tokens, 3, device=bench.device)
        for what, key, some, whose, means in (
            ("", x, None, None, None),
            (", chosen, means removed", shifted, index, index // tokens, mean),
        ):
            found = encode_entries(key, x, some, whose, means, turned, (book, book), ((0.9, 1.0, 1.1), (0.92, 1.04)))
            rest = shifted - mean[None, :, None] if means is not None else x
            for name, of, packed, scale in (("keys", rest, *found[:2]), ("values", x, *found[2:])):
                exact = of.flatten(0, 2).double() @ turned.double()
                exact = exact if some is None else exact[some]
                decoded = levels_of(packed, book.to(bench.device)).double() * scale.double().abs()[:, None]
                # the relative error is the root of the squared one
                allowed = (ENCODED[bits] * (1.2 if bench.rehearsal else 1)) ** 0.5
                told = f"head_dim {dim}, {len(decoded)} entries"
                yield judged(bench, f"encode_entries, {bits} bits, {name}{what}", told, decoded, exact, allowed)


def retention(bench: Bench, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """Token by token in float64, from a state that there is already."""
    length, dim = (70, 32) if bench.rehearsal else (2049, 128)
    query, key, value = (bench.draw(1, 2, length, dim, dtype=dtype) / dim**0.25 for _ in range(3))
    gates = torch.nn.functional.logsigmoid(bench.draw(1, 2, length, dtype=torch.float32)) / 16
    begun = bench.draw(1, 2, dim, dim, dtype=torch.float32)
    out, last = gated_retention(query, key, value, gates, begun)
    state, exact = begun.double(), []
    for n in range(length):
        added = key[:, :, n, :, None].double() * value[:, :, n, None].double()
        state = state * gates[:, :, n, None, None].double().exp() + added
        exact.append((query[:, :, n, None].double() @ state).squeeze(2))
    told = f"{length} tokens, heads of {dim}, {str(dtype)[6:]}"
    yield judged(bench, "gated_retention, outputs", told, out, torch.stack(exact, 2), ROUNDED)
    yield judged(bench, "gated_retention, state", told, last, state, ROUNDED)


def eviction(bench: Bench) -> Iterator[dict[str, Any]]:
    """Scores, norms and the threshold."""
    tokens, window, dim = (70, 5, 32) if bench.rehearsal else (3001, 33, 128)
    query, key, value = bench.draw(1, 2, 3, window, dim), bench.draw(1, 2, tokens, dim), bench.draw(1, 2, tokens, dim)
    scores = query.double() @ key[:, :, None].double().mT * dim**-0.5
    column = torch.arange(tokens, device=bench.device)
    future = column > torch.arange(tokens - window, tokens, device=bench.device)[:, None]
    exact = scores.masked_fill(future, -torch.inf).softmax(-1).mean(3)
    found = window_scores(query, key, scale=dim**-0.5)
    yield judged(bench, "window_scores", f"{tokens} tokens", found, exact, 1e-4)
    weight = bench.draw(2, 3, dim, 200, dtype=torch.float32)
    image = torch.einsum("bhtd,hgdw->bhgtw", value.double(), weight.double())
    for name, matrix, norms in (("L2", weight @ weight.mT, image.norm(dim=-1)), ("L1", weight, image.abs().sum(-1))):
        found = value_norm(value, matrix, name == "L2")
        yield judged(bench, f"value_norm, {name}", f"{tokens} tokens", found, norms.mean(2), ROUNDED)
    # a row that one program holds, and one in splits
    for width in (tokens, tokens if bench.rehearsal else 70_001):
        score = bench.draw(1, 2, width, dtype=torch.float32).abs()
        counts = torch.tensor([[width // 4, 7]], device=bench.device)
        chosen = select(score, counts)
        best = torch.stack([score[0, head].topk(int(counts[0, head])).values.double().sum() for head in range(2)])
        found = (score.double() * chosen).sum(-1)[0]
        yield judged(bench, "select", f"{width} tokens", found, best, 1e-9)
        yield judged(bench, "select, how many", f"{width} tokens", chosen.sum(-1), counts.double(), 0.0)
