"""`code_attention` in Triton: split-KV attention over packed codes, which stay packed until they are in registers.

A program is one warp with a stretch of one run's entries and the query rows that read it. Tokens are the rows of the
tensor-core products and queries their columns, so that a group of up to 8 query heads wastes nothing and each code is
loaded and unpacked once for all of them. Scales stay out of the products: a key's multiplies its score, a value's its
weight. `codes.py` says how codes become numbers; what these owe (the 1024, the factors) is paid once a row.
"""

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_kvcache.kernels import ragged_attention
from hf_kvcache.kernels.triton_ops.codes import (
    assembly,
    numbers,
    packed_book,
    slot_factor,
    slot_middle,
    slot_step,
    slots,
)
from hf_kvcache.kernels.triton_ops.launch import INTERPRETED, LOG2E, columns_for, cut, known, power_of_two, tanh_capped
from hf_kvcache.kernels.triton_ops.merge_states import join_stretches

LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-1e30)
EDGE = tl.constexpr(16)
TILE = tl.constexpr(ragged_attention.TILE)
# the interpreter cannot run it
ASSEMBLY = not INTERPRETED


@triton.jit
def _words(
    WORDS,
    TOPS,
    base,
    low,
    high,
    BITS: tl.constexpr,
    DIM: tl.constexpr,
    WIDE: tl.constexpr,
    N: tl.constexpr,
    EDGE: tl.constexpr,
):
    """The words `[N, WIDE]` of entries base to base + N, and the top bits of 3-bit codes."""
    SLOTS: tl.constexpr = slots(BITS)
    ROW: tl.constexpr = DIM * BITS // 16
    rows = tl.arange(0, N)[:, None]
    words = tl.arange(0, WIDE)[None, :]
    place = WORDS + base * ROW + (rows * ROW + words)
    top_place = TOPS + base * (2 * ROW) + (rows * (2 * ROW) + DIM // 4 + words)
    if EDGE or WIDE * SLOTS != DIM:
        keep = words < DIM // SLOTS
        if EDGE:
            keep &= (rows >= low) & (rows < high)
        found = tl.load(place, mask=keep, other=0)
        if BITS == 3:
            tops = tl.load(top_place, mask=keep, other=0).to(tl.uint16)
        else:
            tops = found
    else:
        found = tl.load(place)
        if BITS == 3:
            tops = tl.load(top_place).to(tl.uint16)
        else:
            tops = found
    return found, tops


@triton.jit
def _tile(
    state, base, low, high, query, offset, factor, shift, cap,
    KW, KT, KS, VW, VT, VS,
    DIM: tl.constexpr, KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr, KEY_WIDE: tl.constexpr,
    VALUE_WIDE: tl.constexpr, KEY_BOOK: tl.constexpr, VALUE_BOOK: tl.constexpr, SHIFT: tl.constexpr,
    CAP: tl.constexpr, N: tl.constexpr, EDGE: tl.constexpr, KEY_ASM: tl.constexpr, VALUE_ASM: tl.constexpr,
):  # fmt: skip
    """Attends to entries base to base + N; with EDGE only to rows low to high of them."""
    highest, total, owed, largest, sums = state
    rows = tl.arange(0, N)
    if EDGE:
        inside = (rows >= low) & (rows < high)
        key_scale = tl.load(KS + base + rows, mask=inside, other=0).to(tl.float32)
        value_scale = tl.load(VS + base + rows, mask=inside, other=0).to(tl.float32)
    else:
        key_scale = tl.load(KS + base + rows).to(tl.float32)
        value_scale = tl.load(VS + base + rows).to(tl.float32)
    words, tops = _words(KW, KT, base, low, high, KEY_BITS, DIM, KEY_WIDE, N, EDGE)
    keys = numbers(words, tops, KEY_BITS, KEY_BOOK, KEY_ASM)
    scores = tl.dot(keys[0], query[0])
    for j in tl.static_range(1, slots(KEY_BITS)):
        scores = tl.dot(keys[j], query[j], scores)
    scores = (scores - offset[None, :]) * (tl.abs(key_scale) * factor)[:, None]
    if SHIFT:
        scores += (key_scale > 0).to(tl.float32)[:, None] * shift[None, :]
    if CAP:
        scores = tanh_capped(scores, cap)
    if EDGE:
        scores = tl.where(inside[:, None], scores, LOWEST)
    higher = tl.maximum(highest, tl.max(scores, 0))
    fade = tl.exp2(highest - higher)
    weights = tl.exp2(scores - higher[None, :])
    total = total * fade + tl.sum(weights, 0)
    # in float16 a weight times a tiny scale would vanish: scales are in units of the largest so far
    larger = tl.maximum(largest, tl.max(tl.abs(value_scale), 0))
    weights = (weights * (value_scale * (1 / larger))[:, None]).to(tl.float16)
    fade *= largest / larger
    if not VALUE_BOOK:
        owed = owed * fade + tl.sum(weights.to(tl.float32), 0)
    words, tops = _words(VW, VT, base, low, high, VALUE_BITS, DIM, VALUE_WIDE, N, EDGE)
    values = numbers(words, tops, VALUE_BITS, VALUE_BOOK, VALUE_ASM)
    across = tl.trans(weights)
    added = ()
    for j in tl.static_range(slots(VALUE_BITS)):
        added = added + (tl.dot(across, values[j], sums[j] * fade[:, None]),)
    return higher, total, owed, larger, added


@triton.jit
def code_attention_kernel(
    Q, BIAS, KW, KT, KS, VW, VT, VS, WORK, OUT, LSE, tokens, splits, per, queries,
    scale, cap, key_a, value_a,
    DIM: tl.constexpr, KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr, KEY_WIDE: tl.constexpr,
    VALUE_WIDE: tl.constexpr, KEY_BOOK: tl.constexpr, VALUE_BOOK: tl.constexpr, SHIFT: tl.constexpr,
    CAP: tl.constexpr, RAGGED: tl.constexpr, COLUMNS: tl.constexpr, N: tl.constexpr, KEY_ASM: tl.constexpr,
    VALUE_ASM: tl.constexpr,
):  # fmt: skip
    """One stretch of entries and COLUMNS query rows.

    `Q [runs, queries, DIM]`, `OUT [stretches, queries, DIM]` and `LSE [stretches, queries]` in float32. With RAGGED,
    `WORK [stretches, 3]` holds (run, first entry, end); without, every run has `tokens` entries, in `splits` stretches
    that end at multiples of TILE.
    """
    stretch = tl.program_id(0)
    if RAGGED:
        run = tl.load(WORK + stretch * 3).to(tl.int64)
        first = tl.load(WORK + stretch * 3 + 1).to(tl.int64)
        end = tl.load(WORK + stretch * 3 + 2).to(tl.int64)
    else:
        run = (stretch // splits).to(tl.int64)
        start = run * tokens
        begin = start // TILE * TILE + (stretch % splits).to(tl.int64) * per
        first = tl.maximum(start, begin)
        end = tl.minimum(start + tokens, begin + per)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    real = column < queries

    SLOTS: tl.constexpr = slots(KEY_BITS)
    word = tl.arange(0, KEY_WIDE)
    source = Q + (run * queries + column[None, :]) * DIM + word[:, None] * SLOTS
    inside = real[None, :] & (word < DIM // SLOTS)[:, None]
    exact = ()
    reach = tl.full([], 1e-30, tl.float32)
    for j in tl.static_range(SLOTS):
        part = tl.load(source + j, mask=inside, other=0).to(tl.float32)
        reach = tl.maximum(reach, tl.max(tl.abs(part)))
        exact = exact + (part,)
    # the query in float16, in units of its largest number
    query = ()
    offset = tl.zeros([COLUMNS], tl.float32)
    for j in tl.static_range(SLOTS):
        part = exact[j] * (1 / reach)
        if KEY_BOOK:
            part = part.to(tl.float16)
        else:
            part = (part * slot_step(j, KEY_BITS)).to(tl.float16)
            offset += tl.sum(part.to(tl.float32), 0) * (slot_middle(j, KEY_BITS) * slot_factor(j, KEY_BITS))
        query = query + (part,)
    factor = reach * scale
    if not KEY_BOOK:
        factor *= key_a
    shift = offset
    if SHIFT:
        shift = tl.load(BIAS + run * queries + column, mask=real, other=0).to(tl.float32) * scale

    V_SLOTS: tl.constexpr = slots(VALUE_BITS)
    zero = tl.zeros([COLUMNS], tl.float32)
    sums = ()
    for _ in tl.static_range(V_SLOTS):
        sums = sums + (tl.zeros([COLUMNS, VALUE_WIDE], tl.float32),)
    state = (tl.full([COLUMNS], LOWEST, tl.float32), zero, zero, 1e-30, sums)

    # whole tiles, which need no mask, from the first boundary on
    full = tl.multiple_of((first + N - 1) // N * N, N)
    count = tl.maximum(end - full, 0).to(tl.int32) // N
    for i in range(0, count):
        base = tl.multiple_of(full + i * N, N)
        state = _tile(
            state, base, 0, N, query, offset, factor, shift, cap, KW, KT, KS, VW, VT, VS,
            DIM, KEY_BITS, VALUE_BITS, KEY_WIDE, VALUE_WIDE, KEY_BOOK, VALUE_BOOK, SHIFT, CAP, N, False,
            KEY_ASM, VALUE_ASM,
        )  # fmt: skip
    # then what is before and behind them, EDGE entries at a time and masked
    behind = full + count * N
    ahead = (tl.where(end > first, full - first, 0).to(tl.int32) + EDGE - 1) // EDGE
    rest = (tl.maximum(end - behind, 0).to(tl.int32) + EDGE - 1) // EDGE
    for i in range(0, ahead + rest):
        base = tl.multiple_of(tl.where(i < ahead, full - (ahead - i) * EDGE, behind + (i - ahead) * EDGE), EDGE)
        state = _tile(
            state, base, first - base, end - base, query, offset, factor, shift, cap,
            KW, KT, KS, VW, VT, VS,
            DIM, KEY_BITS, VALUE_BITS, KEY_WIDE, VALUE_WIDE, KEY_BOOK, VALUE_BOOK, SHIFT, CAP, EDGE,
            True, KEY_ASM, VALUE_ASM,
        )  # fmt: skip

    highest, total, owed, largest, sums = state
    # an empty stretch has the total 0, the result 0 and the log-sum-exp -inf
    unit = largest / tl.maximum(total, 1e-30)
    if not VALUE_BOOK:
        unit *= value_a
    word = tl.arange(0, VALUE_WIDE)
    target = OUT + (stretch.to(tl.int64) * queries + column[:, None]) * DIM + word[None, :] * V_SLOTS
    inside = real[:, None] & (word < DIM // V_SLOTS)[None, :]
    for j in tl.static_range(V_SLOTS):
        result = sums[j]
        if not VALUE_BOOK:
            result = result * slot_step(j, VALUE_BITS) - owed[:, None] * slot_middle(j, VALUE_BITS)
        tl.store(target + j, result * unit[:, None], mask=inside)
    lse = tl.where(total > 0, (highest + tl.log2(tl.maximum(total, 1e-30))) * LN2, float("-inf"))
    tl.store(LSE + stretch.to(tl.int64) * queries + column, lse, mask=real)


def launch(
    query: Tensor, key: tuple[Tensor, Tensor, Tensor], value: tuple[Tensor, Tensor, Tensor], bias: Tensor | None,
    work: Tensor | None, parts: Tensor | None, scale: float, softcap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Both forms, for arguments that `takes` has accepted: query `[R, H, M, D]` over codes of equally long runs, or by
    a list of work; key and value are (codes, scales, levels)."""
    rows, heads, queries, dim = query.shape
    runs, columns = rows * heads, columns_for(queries)
    key_book, value_book = codebook(key[2]), codebook(value[2])
    assert key_book is not None and value_book is not None
    (key_bits, key_a, key_b), (value_bits, value_a, value_b) = key_book, value_book
    books = packed_book(key_a, key_b), packed_book(value_a, value_b)
    if work is None:
        tokens = len(key[0]) // runs
        splits, per = cut(runs, tokens, queries, query.device, aligned=True)
        stretches = runs * splits
    else:
        tokens, splits, per, stretches = 0, 1, 0, len(work)
    exact = query.contiguous()
    shift = exact if bias is None else bias.contiguous()
    final = work is None and splits == 1
    out = query.new_empty((stretches, queries, dim), dtype=query.dtype if final else torch.float32)
    lse = query.new_empty((stretches, queries), dtype=torch.float32)
    if stretches:
        code_attention_kernel[(stretches, triton.cdiv(queries, columns))](
            exact, shift, key[0].view(torch.uint16), key[0], key[1], value[0].view(torch.uint16), value[0], value[1],
            exact if work is None else work, out, lse, tokens, splits, per, queries, scale * LOG2E, softcap * LOG2E,
            key_a, value_a, SHIFT=bias is not None, CAP=softcap > 0, RAGGED=work is not None,
            **configuration(dim, columns, key_bits, books[0], value_bits, books[1]),
        )  # fmt: skip
    if not final:
        out, lse = join_stretches(out, lse, parts, splits, runs, query.dtype)
    return out.view(query.shape), lse.view(query.shape[:-1])


def configuration(
    dim: int, columns: int, key_bits: int, key_book: int, value_bits: int, value_book: int
) -> dict[str, Any]:
    """What the kernel is compiled for, by head dimension, query rows and codebooks: the tile holds as many entries as
    the registers of one warp do decoded."""
    if power_of_two(dim) <= 128 and columns <= 8:
        tile = 128 if key_bits == value_bits == 2 and not (key_book or value_book) else 64
    else:
        tile = 32
    return {
        "DIM": dim,
        "KEY_BITS": key_bits,
        "VALUE_BITS": value_bits,
        "KEY_WIDE": power_of_two(dim // slots(key_bits), 16),
        "VALUE_WIDE": power_of_two(dim // slots(value_bits), 16),
        "KEY_BOOK": key_book,
        "VALUE_BOOK": value_book,
        "KEY_ASM": assembly(key_bits, key_book) if ASSEMBLY else "",
        "VALUE_ASM": assembly(value_bits, value_book) if ASSEMBLY else "",
        "COLUMNS": columns,
        "N": tile,
        "num_warps": 4 if columns > 16 else 1 if dim <= 128 else 2,
        "num_stages": 2,
    }


@lru_cache(maxsize=64)
def codebook(levels_of_codes: Tensor) -> tuple[int, float, float] | None:
    """Bits, a and b of the levels t (a + b t²), t = code - (2^bits - 1) / 2; b is 0 for equal steps.

    None for levels of another form, and for 8 bits. Levels are made once and never change, so that the tensor itself is
    what is remembered: a decoding step asks some times a layer.
    """
    levels = levels_of_codes.tolist()
    bits = (len(levels) - 1).bit_length()
    if bits not in (2, 3, 4) or len(levels) != 2**bits:
        return None
    t = [code - (2**bits - 1) / 2 for code in range(2**bits)]
    # from the outermost level and the one beside the middle
    far, near = levels[-1] / t[-1], levels[2 ** (bits - 1)] / 0.5
    b = (far - near) / (t[-1] ** 2 - 0.25)
    a = near - 0.25 * b
    reach = max(abs(level) for level in levels)
    if any(abs(place * (a + b * place * place) - level) > 1e-5 * reach for place, level in zip(t, levels, strict=True)):
        return None
    return bits, a, 0.0 if abs(b) * t[-1] ** 3 <= 1e-5 * reach else b


def takes(query: Tensor, key: tuple[Tensor, Tensor, Tensor], value: tuple[Tensor, Tensor, Tensor]) -> bool:
    """Whether there is a kernel for these codes and head dimensions."""
    dim = query.shape[-1]
    if dim % 16 or not 16 <= dim <= 256 or not query.numel() or not known(query, key[1], value[1]):
        return False
    # whole words: a slice of the codes may begin at an odd byte
    whole = all(codes.is_contiguous() and codes.data_ptr() % 2 == 0 for codes, _, _ in (key, value))
    return whole and all(codebook(levels) is not None for _, _, levels in (key, value))


def code_attention(
    query: Tensor, key_codes: Tensor, key_scale: Tensor, value_codes: Tensor, value_scale: Tensor, key_levels: Tensor,
    value_levels: Tensor, bias: Tensor | None, mask: Tensor | None, scale: float, softcap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The operator; `NotImplemented` for a mask, 8 bits, levels of another form, and head dimensions that are no
    multiple of 16 or above 256."""
    key, value = (key_codes, key_scale, key_levels), (value_codes, value_scale, value_levels)
    if mask is not None or not takes(query, key, value) or not len(key_codes):
        return NotImplemented
    return launch(query, key, value, bias, None, None, scale, softcap)
