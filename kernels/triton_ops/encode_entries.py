"""`encode_entries` in Triton: gather, rotation, mean, search of the scale and packing of keys and values in one launch.

A program goes through tiles of entries, keys first and then values; the rotation stays in shared memory. Its columns
are in such an order that the codes of a word (see `codes.py`) come to lie in one place of as many tensors, and packing
moves nothing between threads. After it the numbers are small: a vector is divided by its root mean square, and two of
its numbers go through every instruction, in float16 (see `halves.py`). That is enough, because with n the vector, l the
levels of its codes and d = n - l, two small sums are all that is needed: the best scale of these codes is

    n . l / l . l = (E - n . d) / (E - 2 n . d + d . d),     E = n . n,

and d . d - (n . d - d . d)² / l . l is the error that it leaves. The nearest level comes from a polynomial, which is
the inverse of the levels' own; the instruction that ends it also clamps.
"""

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_kvcache.kernels import encode_entries as reference
from hf_kvcache.kernels.ragged_attention import programs_of
from hf_kvcache.kernels.triton_ops.codes import slots
from hf_kvcache.kernels.triton_ops.halves import constant, fused, paired, product, saturated, total, twice
from hf_kvcache.kernels.triton_ops.launch import INTERPRETED, known, power_of_two
from hf_kvcache.kernels.triton_ops.placing import MAGIC, placing

# scales that can be tried
FACTORS = 3
# entries of which the place fits into 32 bits
MOST = 2**31 - 2**16
# stretches of attention for which there is a program here: three on a multiprocessor, as many as its registers hold
SHARE = 4
PAIR_OF_MAGIC = tl.constexpr(twice(MAGIC))
PAIR_OF_HALF = tl.constexpr(twice(0.5))
# root mean square that counts as zero: squares of it are still numbers, and what is less divided by it is not large
LEAST = tl.constexpr(1e-18)
SMALLEST = tl.constexpr(reference.SMALLEST)


@triton.constexpr_function
def _excess(bits):
    """What the MAGIC in all places of a word comes to, when each is shifted to its slot and all are added up."""
    ones = (2 ** (bits * slots(bits) // 2) - 1) // (2**bits - 1)
    return (PAIR_OF_MAGIC * ones + 2**31) % 2**32 - 2**31


@triton.jit
def _argument(number, CURVE: tl.constexpr):
    """What the polynomial is one of: absolute values, or squares."""
    if CURVE == 3:
        return number & 0x7FFF7FFF
    return product(number, number)


@triton.jit
def _place(number, argument, k0, k1, k2, k3, last, CURVE: tl.constexpr):
    """The code of the level nearest to a number, plus MAGIC. The polynomial gives the place from -1/2 to 1/2."""
    if CURVE == 3:
        k2 = fused(argument, k3, k2)
    if CURVE >= 2:
        k1 = fused(argument, k2, k1)
    if CURVE >= 1:
        k0 = fused(argument, k1, k0)
    return fused(saturated(number, k0, constant(PAIR_OF_HALF)), last, constant(PAIR_OF_MAGIC))


@triton.jit
def _centred(y, SHIFT, owner, inside, WIDE: tl.constexpr, SLOTS: tl.constexpr, OWNED: tl.constexpr):
    """The vectors without the mean of their owner where that makes them shorter, and where it does."""
    words = tl.arange(0, WIDE)
    first, last = 0, 0
    if OWNED:
        # neighbours have an owner in common, so that this is mostly one turn
        last = tl.max(owner, 0)
        first = tl.min(tl.where(inside, owner, last), 0)
    nearer = inside & (owner < 0)
    for one in range(first, last + 1):
        shifts = ()
        dot = tl.zeros_like(y[0])
        norm = tl.zeros([WIDE], tl.float32)
        for j in tl.static_range(SLOTS):
            shift = tl.load(SHIFT + tl.full([], one, tl.int64) * (SLOTS * WIDE) + j * WIDE + words)
            dot += y[j] * shift[None, :]
            norm += shift * shift
            shifts = shifts + (shift,)
        # |y - m| <= |y|
        closer = (owner == one) & (2 * tl.sum(dot, 1) >= tl.sum(norm, 0))
        part = tl.where(closer, 1.0, 0.0)
        centred = ()
        for j in tl.static_range(SLOTS):
            centred = centred + (y[j] - part[:, None] * shifts[j][None, :],)
        y = centred
        nearer = nearer | closer
    return y, nearer


@triton.jit
def _by_slots(y, N: tl.constexpr, WIDE: tl.constexpr, SLOTS: tl.constexpr):
    """The parts `[N, WIDE]` of `[N, SLOTS * WIDE]`, which stay in the registers where they are."""
    if SLOTS == 4:
        even, odd = tl.split(tl.permute(tl.reshape(y, [N, 2, 2, WIDE]), (0, 3, 1, 2)))
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        return first, second, third, fourth
    else:
        low, high = tl.split(tl.permute(tl.reshape(y, [N, 2, 4 * WIDE]), (0, 2, 1)))
        return _by_slots(low, N, WIDE, 4) + _by_slots(high, N, WIDE, 4)


@triton.jit
def _rotated(
    X, source, inside, start, y, turn, low,
    DIM: tl.constexpr, STEP: tl.constexpr, EXACT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """y plus what some dims of the vectors add to it."""
    dims = start + tl.arange(0, STEP)
    # entries behind the last are not stored; dims behind the last meet zeros, and must be numbers
    if DIM % STEP == 0:
        x = tl.load(X + source[:, None] + dims[None, :], mask=inside[:, None])
    else:
        x = tl.load(X + source[:, None] + dims[None, :], mask=inside[:, None] & (dims < DIM)[None, :], other=0)
    if UPCAST:
        x = x.to(tl.float32)
    y = tl.dot(x, turn.to(x.dtype), y, input_precision="tf32x3")
    if not EXACT:
        y = tl.dot(x, low.to(x.dtype), y, input_precision="tf32x3")
    return y


@triton.jit
def _quotient(number, factor, shift):
    """A number below 2^31 divided by what `_reciprocal` was made of."""
    return (number.to(tl.uint64) * tl.full([], factor, tl.uint64) >> tl.full([], shift, tl.uint64)).to(tl.int64)


@triton.jit
def _source(
    X, tile, row, inside, INDEX, heads, tokens, head_factor, head_shift, token_factor, token_shift,
    by_row, by_head, by_token,
    GATHER: tl.constexpr, FLAT: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Where the vectors of entries begin: a pointer, and how far they are from it."""
    if FLAT:
        return X + tl.full([], tile * N, tl.int64) * by_token, tl.arange(0, N) * by_token
    else:
        if GATHER:
            row = tl.load(INDEX + row, mask=inside, other=0)
        row = row.to(tl.int64)
        run = _quotient(row, token_factor, token_shift)
        batch = _quotient(run, head_factor, head_shift)
        return X, batch * by_row + (run - batch * heads) * by_head + (row - run * tokens) * by_token


@triton.jit
def _encode(
    X, row, inside, source, TURN, LOW, turn, low, SHIFT, owner, WORDS, TOPS, SCALES, size,
    DIM: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, BITS: tl.constexpr, WIDE: tl.constexpr,
    BOOK: tl.constexpr, OWNED: tl.constexpr, CENTER: tl.constexpr, EXACT: tl.constexpr, UPCAST: tl.constexpr,
    N: tl.constexpr,
):  # fmt: skip
    """Keys or values of N entries; `source` is where each begins, `size` the size of the numbers in TURN."""
    SLOTS: tl.constexpr = slots(BITS)
    HALF: tl.constexpr = SLOTS // 2
    words = tl.arange(0, WIDE)
    real = (words < DIM // SLOTS)[None, :]
    y = tl.zeros([N, SLOTS * WIDE], tl.float32)
    if STEP == ROWS:
        y = _rotated(X, source, inside, 0, y, turn, low, DIM, STEP, EXACT, UPCAST)
    else:
        for start in range(0, DIM, STEP):
            place = (start + tl.arange(0, STEP))[:, None] * (SLOTS * WIDE) + tl.arange(0, SLOTS * WIDE)[None, :]
            turn = tl.load(TURN + place)
            low = turn if EXACT else tl.load(LOW + place)
            y = _rotated(X, source, inside, start, y, turn, low, DIM, STEP, EXACT, UPCAST)
    y = _by_slots(y, N, WIDE, SLOTS)
    # the means are in the units of TURN, too
    if CENTER:
        y, nearer = _centred(y, SHIFT, owner, inside, WIDE, SLOTS, OWNED)
    squares = tl.zeros([N, WIDE], tl.float32)
    for j in tl.static_range(SLOTS):
        squares += y[j] * y[j]
    energy = tl.sum(squares, 1)
    root = tl.maximum(tl.sqrt(energy / DIM), LEAST)
    unit = 1 / root
    numbers = ()
    for j in tl.static_range(HALF):
        numbers = numbers + (paired(y[j] * unit[:, None], y[j + HALF] * unit[:, None]),)
    energy = energy * unit * unit
    # what is not finite has no error below infinity, and a scale that says so
    best_scale = tl.full([N], float("nan"), tl.float32)
    best_error = tl.full([N], float("inf"), tl.float32)
    CURVE: tl.constexpr = BOOK[3]
    last, scale, offset = constant(BOOK[0]), constant(BOOK[1]), constant(BOOK[2])
    packed = tl.zeros([N, WIDE], tl.int32)
    for i in tl.static_range(4, len(BOOK)):
        k0, k1, k2, k3 = constant(BOOK[i][1]), constant(BOOK[i][2]), constant(BOOK[i][3]), constant(BOOK[i][4])
        a, b = constant(BOOK[i][5]), constant(BOOK[i][6])
        lost = tl.zeros([N, WIDE], tl.int32)
        along, word = lost, lost
        for j in tl.static_range(HALF):
            number = numbers[j]
            place = _place(number, _argument(number, CURVE), k0, k1, k2, k3, last, CURVE)
            t = fused(place, scale, offset)
            if BOOK[i][6] == 0:
                rest = fused(t, a, number)
            else:
                rest = fused(t, fused(product(t, t), b, a), number)
            if WIDE * SLOTS != DIM:
                rest = tl.where(real, rest, 0)
            if j == 0:
                lost, along, word = product(rest, rest), product(number, rest), place
            else:
                lost, along, word = fused(rest, rest, lost), fused(number, rest, along), word + (place << BITS * j)
        lost, along = total(lost), total(along)
        length = energy - 2 * along + lost
        error = lost - (along - lost) * (along - lost) / length
        better = error < best_error
        best_error = tl.where(better, error, best_error)
        best_scale = tl.where(better, BOOK[i][0] * (energy - along) / length, best_scale)
        packed = tl.where(better[:, None], word, packed)
    # the codes of both halves, without what the places have above them
    packed -= _excess(BITS)
    keep = inside[:, None] & real
    WORDS_OF: tl.constexpr = DIM * BITS // 16
    place = row[:, None].to(tl.int64) * WORDS_OF + words[None, :]
    codes = packed
    if BITS == 3:
        codes, tops = packed & 0x30003, (packed >> 2) & 0x10001
        for j in tl.static_range(1, HALF):
            codes |= (packed >> j) & (0x30003 << 2 * j)
            tops |= (packed >> (2 + 2 * j)) & (0x10001 << j)
    # no bit of one half is one of the other, and a sum is one instruction
    tl.store(WORDS + place, (codes + (codes >> 8)).to(tl.uint16), mask=keep)
    if BITS == 3:
        place = row[:, None].to(tl.int64) * (2 * WORDS_OF) + DIM // 4 + words[None, :]
        tl.store(TOPS + place, (tops | tops >> 12).to(tl.uint8), mask=keep)
    scale = best_scale * root * size
    half = scale.to(tl.float16).to(tl.float32)
    scale = tl.where(tl.abs(half) < float("inf"), half, scale)
    if CENTER:
        scale = tl.where(nearer, tl.maximum(scale, SMALLEST), -scale)
    tl.store(SCALES + row, scale, mask=inside)


@triton.jit
def encode_kernel(
    K, V, INDEX, OWNERS, SHIFT, KEY_TURN, KEY_LOW, VALUE_TURN, VALUE_LOW, KW, KT, KS, VW, VT, VS, entries, tiles, heads,
    tokens, head_factor, head_shift, token_factor, token_shift, last_owner, k_row, k_head, k_token, v_row, v_head,
    v_token, size,
    DIM: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr,
    KEY_WIDE: tl.constexpr, VALUE_WIDE: tl.constexpr, KEY_BOOK: tl.constexpr, VALUE_BOOK: tl.constexpr,
    GATHER: tl.constexpr, FLAT: tl.constexpr, OWNED: tl.constexpr, CENTER: tl.constexpr, EXACT: tl.constexpr,
    UPCAST: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Every so many-th of the tiles of N entries: first the tiles of keys, then those of values."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    KEY_COLUMNS: tl.constexpr = slots(KEY_BITS) * KEY_WIDE
    place = tl.arange(0, STEP)[:, None] * KEY_COLUMNS + tl.arange(0, KEY_COLUMNS)[None, :]
    turn = tl.load(KEY_TURN + place)
    low = turn if EXACT else tl.load(KEY_LOW + place)
    for tile in range(program, tiles, programs):
        row = tile * N + tl.arange(0, N)
        inside = row < entries
        first, source = _source(
            K, tile, row, inside, INDEX, heads, tokens, head_factor, head_shift, token_factor, token_shift,
            k_row, k_head, k_token, GATHER, FLAT, N,
        )  # fmt: skip
        if OWNED:
            owner = tl.load(OWNERS + row, mask=inside, other=0)
            owner = tl.minimum(owner, last_owner).to(tl.int32)
        else:
            owner = tl.zeros([N], tl.int32)
        _encode(
            first, row, inside, source, KEY_TURN, KEY_LOW, turn, low, SHIFT, owner, KW, KT, KS, size,
            DIM, ROWS, STEP, KEY_BITS, KEY_WIDE, KEY_BOOK, OWNED, CENTER, EXACT, UPCAST, N,
        )  # fmt: skip
    VALUE_COLUMNS: tl.constexpr = slots(VALUE_BITS) * VALUE_WIDE
    place = tl.arange(0, STEP)[:, None] * VALUE_COLUMNS + tl.arange(0, VALUE_COLUMNS)[None, :]
    turn = tl.load(VALUE_TURN + place)
    low = turn if EXACT else tl.load(VALUE_LOW + place)
    # where it would be if it went on through tiles of keys
    done = tl.cdiv(tl.maximum(tiles - program, 0), programs) * programs
    for tile in range(program + done - tiles, tiles, programs):
        row = tile * N + tl.arange(0, N)
        inside = row < entries
        first, source = _source(
            V, tile, row, inside, INDEX, heads, tokens, head_factor, head_shift, token_factor, token_shift,
            v_row, v_head, v_token, GATHER, FLAT, N,
        )  # fmt: skip
        _encode(
            first, row, inside, source, VALUE_TURN, VALUE_LOW, turn, low, SHIFT, row, VW, VT, VS, size,
            DIM, ROWS, STEP, VALUE_BITS, VALUE_WIDE, VALUE_BOOK, False, False, EXACT, UPCAST, N,
        )  # fmt: skip


def encode_entries(
    key: Tensor, value: Tensor, index: Tensor | None, owners: Tensor | None, mean: Tensor | None, rotation: Tensor,
    key_levels: Tensor, value_levels: Tensor, key_factors: list[float], value_factors: list[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The operator; `NotImplemented` for float64, 8 bits, levels of another form than t (a + b t²), more than three
    factors, head dimensions that are no multiple of 16 or above 256, and 2^31 entries."""
    batch, heads, tokens, dim = key.shape
    key_book, value_book = (
        placing(tuple(levels.tolist()), tuple(factors))
        for levels, factors in ((key_levels, key_factors), (value_levels, value_factors))
    )
    fits = dim % 16 == 0 and 16 <= dim <= 256 and max(len(key_factors), len(value_factors)) <= FACTORS
    if not fits or not known(key, value, rotation) or key.dtype != value.dtype:
        return NotImplemented
    if key_book is None or value_book is None:
        return NotImplemented
    entries = batch * heads * tokens if index is None else len(index)
    if max(entries, batch * heads * tokens) >= MOST:
        return NotImplemented
    key, value = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (key, value))
    bits = key_book[0], value_book[0]
    made = []
    for width in bits:
        made.append(torch.empty(entries, dim * width // 8, dtype=torch.uint8, device=key.device))
        made.append(torch.empty(entries, dtype=torch.float32, device=key.device))
    key_codes, key_scale, value_codes, value_scale = made
    if not entries:
        return key_codes, key_scale, value_codes, value_scale
    by_slots = [_columns_by_slots(rotation, width) for width in bits]
    turns = [_split(turned, key.dtype, dim**-0.5) for turned in by_slots]
    size = turns[0][2]
    shift = turns[0][0] if mean is None else mean.to(torch.float32) @ by_slots[0][:dim] / size
    index, owners = (None if tensor is None else tensor.to(key.device).contiguous() for tensor in (index, owners))
    compiled = configuration(dim, *bits, key.dtype.itemsize, _hopper(key.device))
    tiles = triton.cdiv(entries, compiled["N"])
    encode_kernel[(min(2 * tiles, programs_of(key.device) // SHARE),)](
        key, value, key if index is None else index, key if owners is None else owners, shift,
        *(turns[0][0] if part is None else part for turn in turns for part in turn[:2]),
        key_codes.view(torch.uint16), key_codes, key_scale, value_codes.view(torch.uint16), value_codes, value_scale,
        entries, tiles, heads, tokens, *_reciprocal(heads), *_reciprocal(tokens),
        0 if mean is None else len(mean) - 1, *key.stride()[:3], *value.stride()[:3], size,
        KEY_BOOK=key_book[1:], VALUE_BOOK=value_book[1:], GATHER=index is not None,
        FLAT=index is None and all(_in_one_piece(tensor) for tensor in (key, value)),
        OWNED=owners is not None, CENTER=mean is not None, EXACT=turns[0][1] is None,
        UPCAST=INTERPRETED and key.dtype == torch.bfloat16, **compiled,
    )  # fmt: skip
    return key_codes, key_scale, value_codes, value_scale


def _reciprocal(divisor: int) -> tuple[int, int]:
    """A factor and a shift to the right that together divide numbers below 2^31."""
    shift = 31 + (divisor - 1).bit_length()
    return 2**shift // divisor + 1, shift


def _in_one_piece(tensor: Tensor) -> bool:
    """Whether every entry is as far from the next one, through all heads and rows."""
    batch, heads, tokens, _ = tensor.shape
    by_row, by_head, by_token, _ = tensor.stride()
    near = by_token < 2**24
    return near and (heads == 1 or by_head == tokens * by_token) and (batch == 1 or by_row == heads * tokens * by_token)


def configuration(dim: int, key_bits: int, value_bits: int, itemsize: int, hopper: bool = False) -> dict[str, Any]:
    """What the kernel is compiled for, on an H100 or H200 or something else."""
    rows = power_of_two(dim, 16)
    made = {
        "DIM": dim,
        "ROWS": rows,
        # all of the rotation stays in shared memory where there is room for it
        "STEP": min(rows, 128) if itemsize == 2 else 16,
        "KEY_BITS": key_bits,
        "VALUE_BITS": value_bits,
        "KEY_WIDE": power_of_two(dim // slots(key_bits), 16),
        "VALUE_WIDE": power_of_two(dim // slots(value_bits), 16),
        # what a group of four warps multiplies at once
        "N": 64,
        "num_warps": 4 if dim <= 128 else 8,
        "num_stages": 1,
    }
    # so that three programs fit on a multiprocessor; elsewhere that would cost spills
    return made | {"maxnreg": 168} if hopper and dim in (64, 128) and itemsize == 2 else made


def _hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


@lru_cache(maxsize=16)
def _columns_by_slots(rotation: Tensor, bits: int) -> Tensor:
    """The rotation with the columns of a slot side by side, and zeros up to the sizes that the kernel computes in."""
    dim, count = len(rotation), slots(bits)
    made = rotation.new_zeros(power_of_two(dim, 16), count, power_of_two(dim // count, 16))
    made[:dim, :, : dim // count] = rotation.unflatten(1, (-1, count)).transpose(1, 2)
    return made.flatten(1)


@lru_cache(maxsize=16)
def _split(rotation: Tensor, dtype: torch.dtype, size: float) -> tuple[Tensor, Tensor | None, float]:
    """The rotation as one or two matrices of a dtype, and the size of their numbers. A Hadamard matrix of signs needs
    one; others keep twice the digits of the dtype."""
    if dtype == torch.float32:
        return rotation.contiguous(), None, 1.0
    exact = rotation.double() / size
    # a sign as float32 has it is not quite one
    exact = torch.where((exact.abs() - 1).abs() < 1e-6, exact.sign(), exact)
    high = exact.to(dtype)
    low = (exact - high.double()).to(dtype)
    return high.contiguous(), low.contiguous() if bool(low.any()) else None, size
