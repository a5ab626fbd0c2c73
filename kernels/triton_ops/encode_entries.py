"""`encode_entries` in Triton: gather, rotation, mean, search of the scale and packing of keys and values in one launch.

A program has some entries, and either their keys or their values. The rotation is a product for every slot of a word
(see `codes.py`), so that the codes of a word lie in one place of as many tensors and packing moves nothing between
threads. The nearest level comes from a polynomial, which is the inverse of the levels' own.
"""

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_kvcache.kernels import encode_entries as reference
from hf_kvcache.kernels.triton_ops.code_attention import codebook
from hf_kvcache.kernels.triton_ops.codes import slots
from hf_kvcache.kernels.triton_ops.launch import INTERPRETED, known, power_of_two

# scales that can be tried
FACTORS = 3
# added to a number below 2^22, it rounds it to a whole one, which then stands in the lowest bits
MAGIC = tl.constexpr(1.5 * 2**23)
# dims that meet the rotation at once
STEP = tl.constexpr(16)
LEAST = tl.constexpr(reference.LEAST)
SMALLEST = tl.constexpr(reference.SMALLEST)


@triton.jit
def _place(number, book, BITS: tl.constexpr):
    """The code of the level nearest to a number, plus MAGIC."""
    top, first, third, fifth = book[2], book[3], book[4], book[5]
    number = tl.minimum(tl.maximum(number, -top), top)
    square = number * number
    return number * (first + square * (third + square * fifth)) + (2**BITS - 1) / 2 + MAGIC


@triton.jit
def _encode(
    X, source, row, inside, TURN, LOW, SHIFT, owner, WORDS, TOPS, SCALES, size, book, factors,
    DIM: tl.constexpr, ROWS: tl.constexpr, BITS: tl.constexpr, WIDE: tl.constexpr, COUNT: tl.constexpr,
    CENTER: tl.constexpr, EXACT: tl.constexpr, UPCAST: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Keys or values of N entries; `source` is where each begins, `size` the size of the numbers in TURN."""
    SLOTS: tl.constexpr = slots(BITS)
    MIDDLE: tl.constexpr = (2**BITS - 1) / 2
    words = tl.arange(0, WIDE)
    real = words < DIM // SLOTS
    sums = ()
    for _ in tl.static_range(SLOTS):
        sums = sums + (tl.zeros([N, WIDE], tl.float32),)
    # some dims at a time: the rotation would not fit in the registers
    for start in range(0, ROWS, STEP):
        dims = start + tl.arange(0, STEP)
        x = tl.load(X + source[:, None] + dims[None, :], mask=inside[:, None] & (dims < DIM)[None, :], other=0)
        if UPCAST:
            x = x.to(tl.float32)
        added = ()
        for j in tl.static_range(SLOTS):
            place = dims[:, None] * DIM + words[None, :] * SLOTS + j
            keep = (dims < DIM)[:, None] & real[None, :]
            part = tl.load(TURN + place, mask=keep, other=0).to(x.dtype)
            part = tl.dot(x, part, sums[j], input_precision="tf32x3")
            if not EXACT:
                rest = tl.load(LOW + place, mask=keep, other=0).to(x.dtype)
                part = tl.dot(x, rest, part, input_precision="tf32x3")
            added = added + (part,)
        sums = added
    turned = ()
    energy = tl.zeros([N], tl.float32)
    for j in tl.static_range(SLOTS):
        part = sums[j] * size
        energy += tl.sum(part * part, 1)
        turned = turned + (part,)
    if CENTER:
        centred = ()
        short = tl.zeros([N], tl.float32)
        for j in tl.static_range(SLOTS):
            shift = tl.load(
                SHIFT + owner[:, None] * DIM + words[None, :] * SLOTS + j, mask=inside[:, None] & real[None, :], other=0
            )
            part = turned[j] - shift
            short += tl.sum(part * part, 1)
            centred = centred + (part,)
        nearer = short <= energy
        energy = tl.minimum(short, energy)
        chosen = ()
        for j in tl.static_range(SLOTS):
            chosen = chosen + (tl.where(nearer[:, None], centred[j], turned[j]),)
        turned = chosen
    root = tl.maximum(tl.sqrt(energy / DIM), LEAST)
    best_unit = tl.zeros([N], tl.float32)
    # what is not finite has no error below infinity, and a scale that says so
    best_scale = tl.full([N], float("nan"), tl.float32)
    best_error = tl.full([N], float("inf"), tl.float32)
    for i in tl.static_range(COUNT):
        unit = 1 / (root * factors[i])
        along = tl.zeros([N], tl.float32)
        length = tl.zeros([N], tl.float32)
        for j in tl.static_range(SLOTS):
            t = (_place(turned[j] * unit[:, None], book, BITS) - MAGIC) - MIDDLE
            level = t * (book[0] + book[1] * (t * t))
            if WIDE * SLOTS != DIM:
                level = tl.where(real[None, :], level, 0)
            along += tl.sum(level * turned[j], 1)
            length += tl.sum(level * level, 1)
        scale = along / length
        half = scale.to(tl.float16).to(tl.float32)
        scale = tl.where(tl.abs(half) < float("inf"), half, scale)
        error = energy - 2 * scale * along + scale * scale * length
        better = error < best_error
        best_unit = tl.where(better, unit, best_unit)
        best_scale = tl.where(better, scale, best_scale)
        best_error = tl.where(better, error, best_error)
    packed = tl.zeros([N, WIDE], tl.int32)
    tops = tl.zeros([N, WIDE], tl.int32)
    for j in tl.static_range(SLOTS):
        code = _place(turned[j] * best_unit[:, None], book, BITS).to(tl.int32, bitcast=True)
        if BITS == 3:
            packed |= (code & 3) << (2 * j)
            tops |= (code >> 2 & 1) << j
        else:
            packed |= (code & (2**BITS - 1)) << (BITS * j)
    keep = inside[:, None] & real[None, :]
    WORDS_OF: tl.constexpr = DIM * BITS // 16
    tl.store(WORDS + row[:, None] * WORDS_OF + words[None, :], packed.to(tl.uint16), mask=keep)
    if BITS == 3:
        tl.store(TOPS + row[:, None] * (2 * WORDS_OF) + DIM // 4 + words[None, :], tops.to(tl.uint8), mask=keep)
    if CENTER:
        best_scale = tl.where(nearer, tl.maximum(best_scale, SMALLEST), -best_scale)
    tl.store(SCALES + row, best_scale, mask=inside)


@triton.jit
def encode_kernel(
    K, V, INDEX, OWNERS, SHIFT, TURN, LOW, KW, KT, KS, VW, VT, VS, entries, heads, tokens, last_owner,
    k_row, k_head, k_token, v_row, v_head, v_token, size,
    key_a, key_b, key_top, key_1, key_3, key_5, value_a, value_b, value_top, value_1, value_3, value_5,
    key_factor_0, key_factor_1, key_factor_2, value_factor_0, value_factor_1, value_factor_2,
    DIM: tl.constexpr, ROWS: tl.constexpr, KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr, KEY_WIDE: tl.constexpr,
    VALUE_WIDE: tl.constexpr, KEY_COUNT: tl.constexpr, VALUE_COUNT: tl.constexpr, GATHER: tl.constexpr,
    OWNED: tl.constexpr, CENTER: tl.constexpr, EXACT: tl.constexpr, UPCAST: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """N entries: keys in the first half of the programs, values in the second."""
    row = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    inside = row < entries
    chosen = tl.load(INDEX + row, mask=inside, other=0) if GATHER else row
    batch, head, token = chosen // tokens // heads, chosen // tokens % heads, chosen % tokens
    if tl.program_id(1) == 0:
        if OWNED:
            owner = tl.minimum(tl.load(OWNERS + row, mask=inside, other=0), last_owner)
        else:
            owner = tl.zeros([N], tl.int64)
        _encode(
            K, batch * k_row + head * k_head + token * k_token, row, inside, TURN, LOW, SHIFT, owner, KW, KT, KS, size,
            (key_a, key_b, key_top, key_1, key_3, key_5), (key_factor_0, key_factor_1, key_factor_2),
            DIM, ROWS, KEY_BITS, KEY_WIDE, KEY_COUNT, CENTER, EXACT, UPCAST, N,
        )  # fmt: skip
    else:
        _encode(
            V, batch * v_row + head * v_head + token * v_token, row, inside, TURN, LOW, SHIFT, row, VW, VT, VS, size,
            (value_a, value_b, value_top, value_1, value_3, value_5), (value_factor_0, value_factor_1, value_factor_2),
            DIM, ROWS, VALUE_BITS, VALUE_WIDE, VALUE_COUNT, False, EXACT, UPCAST, N,
        )  # fmt: skip


def encode_entries(
    key: Tensor, value: Tensor, index: Tensor | None, owners: Tensor | None, mean: Tensor | None, rotation: Tensor,
    key_levels: Tensor, value_levels: Tensor, key_factors: list[float], value_factors: list[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The operator; `NotImplemented` for float64, 8 bits, levels of another form than t (a + b t²), more than three
    factors, and head dimensions that are no multiple of 16 or above 256."""
    batch, heads, tokens, dim = key.shape
    key_book, value_book = (placing(tuple(levels.tolist())) for levels in (key_levels, value_levels))
    fits = dim % 16 == 0 and 16 <= dim <= 256 and max(len(key_factors), len(value_factors)) <= FACTORS
    if not fits or not known(key, value, rotation) or key.dtype != value.dtype:
        return NotImplemented
    if key_book is None or value_book is None:
        return NotImplemented
    key, value = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (key, value))
    entries = batch * heads * tokens if index is None else len(index)
    bits = key_book[0], value_book[0]
    made = []
    for width in bits:
        made.append(torch.empty(entries, dim * width // 8, dtype=torch.uint8, device=key.device))
        made.append(torch.empty(entries, dtype=torch.float32, device=key.device))
    key_codes, key_scale, value_codes, value_scale = made
    if not entries:
        return key_codes, key_scale, value_codes, value_scale
    turn, low, size = _split(rotation, key.dtype)
    shift = turn if mean is None else mean.to(torch.float32) @ rotation
    index, owners = (None if tensor is None else tensor.to(key.device).contiguous() for tensor in (index, owners))
    compiled = configuration(dim, *bits, key.dtype.itemsize)
    factors = [number for few in (key_factors, value_factors) for number in (*few, *[1.0] * (FACTORS - len(few)))]
    encode_kernel[(triton.cdiv(entries, compiled["N"]), 2)](
        key, value, key if index is None else index, key if owners is None else owners, shift, turn,
        turn if low is None else low, key_codes.view(torch.uint16), key_codes, key_scale,
        value_codes.view(torch.uint16), value_codes, value_scale, entries, heads, tokens,
        0 if mean is None else len(mean) - 1, *key.stride()[:3], *value.stride()[:3], size,
        *key_book[1:], *value_book[1:], *factors,
        KEY_COUNT=len(key_factors), VALUE_COUNT=len(value_factors), GATHER=index is not None,
        OWNED=owners is not None, CENTER=mean is not None, EXACT=low is None,
        UPCAST=INTERPRETED and key.dtype == torch.bfloat16, **compiled,
    )  # fmt: skip
    return key_codes, key_scale, value_codes, value_scale


def configuration(dim: int, key_bits: int, value_bits: int, itemsize: int) -> dict[str, Any]:
    """What the kernel is compiled for."""
    return {
        "DIM": dim,
        "ROWS": power_of_two(dim, 16),
        "KEY_BITS": key_bits,
        "VALUE_BITS": value_bits,
        "KEY_WIDE": power_of_two(dim // slots(key_bits), 16),
        "VALUE_WIDE": power_of_two(dim // slots(value_bits), 16),
        "N": 32 if dim <= 128 and itemsize == 2 else 16,
        "num_warps": 4,
        "num_stages": 1,
    }


@lru_cache(maxsize=64)
def placing(levels: tuple[float, ...]) -> tuple[int, float, float, float, float, float, float] | None:
    """Bits, a and b of levels t (a + b t²), their largest, and the odd polynomial that finds the code of a number.

    The polynomial takes the middle between two levels to the middle of their places. None where the levels have no
    such form, or the polynomial is off by more than a tenth of a step: a number so near to the middle has two levels
    that are nearly as good.
    """
    book = codebook(torch.tensor(levels, dtype=torch.float64))
    if book is None:
        return None
    bits, a, b = book
    positive = torch.tensor(levels[2 ** (bits - 1) :], dtype=torch.float64)
    middles = (positive[1:] + positive[:-1]) / 2
    wanted = torch.arange(1.0, len(middles) + 1, dtype=torch.float64)
    powers = [1, 3, 5][: len(middles)]
    if b == 0:
        powers = powers[:1]
    basis = torch.stack([middles**power for power in powers], 1)
    found = torch.linalg.lstsq(basis, wanted[:, None]).solution[:, 0]
    factors = found.tolist() + [0.0] * (3 - len(powers))
    off = (basis @ found - wanted).abs().max()
    places = sum(factor * positive**power for factor, power in zip(factors, (1, 3, 5), strict=True))
    wrong = (places - (torch.arange(len(positive)) + 0.5)).abs().max()
    if off > 0.1 or wrong >= 0.45:
        return None
    return bits, a, b, float(positive[-1]), *factors


@lru_cache(maxsize=16)
def _split(rotation: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None, float]:
    """The rotation as one or two matrices of a dtype, and the size of their numbers. A Hadamard matrix of signs needs
    one; others keep twice the digits of the dtype."""
    if dtype == torch.float32:
        return rotation.contiguous(), None, 1.0
    size = rotation.shape[0] ** -0.5
    exact = rotation.double() / size
    # a sign as float32 has it is not quite one
    exact = torch.where((exact.abs() - 1).abs() < 1e-6, exact.sign(), exact)
    high = exact.to(dtype)
    low = (exact - high.double()).to(dtype)
    return high.contiguous(), low.contiguous() if bool(low.any()) else None, size
