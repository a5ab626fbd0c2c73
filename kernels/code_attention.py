"""`code_attention`: attention of a few queries over codes of keys and values, without a dense copy of them.

    k_t = |s_t| levels[code_t] (+ the owner's mean, where s_t > 0),   v_t = s_t levels[code_t]
    S = softcap(scale * (q . k_t)),   lse = log sum_t exp(S_t),   O = exp(S - lse) V

Codes are packed by `pack` below, `bits` a code:

    8 bits   one code a byte
    4 bits   byte j holds the codes of dims 2j (low half) and 2j+1
    2 bits   byte j holds the codes of dims 4j .. 4j+3, the lowest bits first
    3 bits   as 2 bits for the two lower bits of a code, D/4 bytes; then the top bits, eight to a byte, D/8 bytes

so that an entry is a whole number of bytes, and any choice of entries is a valid block. Decoding is one look-up for all
codes of a byte: PyTorch's `index_select` moves 8 or 16 bytes at a time when it is told that two or four floats are one
number, and is then as fast as shifting and converting, with any codebook.

The means never meet the codes: q . mean is one number a query and owner, which the caller passes as `bias`. A key's
scale is positive when the mean was removed from it, and else not; its magnitude is the scale.

Shapes: query `[R, H, M, D]` (rotated as the codes are), codes `[R*H*T, bytes]`, scales `[R*H*T]`, levels `[2^bits]`,
bias `[R, H, M]` or None, mask boolean (True = attend) or additive, broadcastable to `[R, H, M, T]`, or None. Returns
out `[R, H, M, D]` in the dtype of the query (still rotated as the codes) and lse `[R, H, M]` in float32. A row without
a key that it may attend to has out 0 and lse -inf.
"""

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from hf_kvcache.kernels.library import LIBRARY, at_once, refuse_gradient, straight_to_cpu, with_triton

# entries decoded at once: their floats, half of a megabyte at head_dim 64, stay in the second-level cache
ENTRIES = 2048
# scores held at once, in numbers; more queries than that are attended in turns
SCORES = 1 << 22
# the same on a GPU, which a launch of so few would leave idle: 128 MiB at head_dim 128, and 256 MiB
GPU_ENTRIES, GPU_SCORES = 1 << 18, 1 << 26

LIBRARY.define(
    "code_attention(Tensor query, Tensor key_codes, Tensor key_scale, Tensor value_codes, Tensor value_scale,"
    " Tensor key_levels, Tensor value_levels, Tensor? bias, Tensor? mask, float scale, float softcap)"
    " -> (Tensor, Tensor)"
)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Packs uint8 codes `[N, D]` below 2^bits into `[N, D * bits / 8]` bytes; D is a multiple of 8."""
    if bits == 8:
        return codes.contiguous()
    if bits == 4:
        return codes[:, ::2] | codes[:, 1::2] << 4
    if bits == 2:
        return codes[:, ::4] | codes[:, 1::4] << 2 | codes[:, 2::4] << 4 | codes[:, 3::4] << 6
    top = codes >> 2
    high = top[:, ::8].clone()
    for place in range(1, 8):
        high |= top[:, place::8] << place
    return torch.cat([pack(codes & 3, 2), high], dim=1)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The inverse of `pack`: uint8 codes `[N, D]`."""
    # numbers of the host: read back from a device they would stop it, and could not be recorded in a graph
    return _found(packed, look_up_table(tuple(map(float, range(2**bits))), bits, packed.device), bits).to(torch.uint8)


def levels_of(packed: Tensor, levels: Tensor) -> Tensor:
    """levels[codes] of packed codes `[N, bytes]`: float32 `[N, D]`."""
    bits = (levels.numel() - 1).bit_length()
    return _found(packed, look_up_table(tuple(levels.tolist()), bits, packed.device), bits)


def _found(packed: Tensor, table: Tensor, bits: int) -> Tensor:
    if bits == 3:
        low, top = packed.split([packed.shape[1] * 2 // 3, packed.shape[1] // 3], dim=1)
        index = low.reshape(-1).to(torch.int32)
        # a byte of top bits serves two bytes of lower ones, which are one int64 of indices
        index.view(torch.int64).bitwise_or_(
            torch.index_select(_spread(packed.device), 0, top.reshape(-1).to(torch.int32))
        )
    else:
        index = packed.to(torch.int32)
    found = torch.index_select(table, 0, index.view(-1)).view(torch.float32)
    return found.view(len(packed), packed.shape[1] * 8 // bits)


@lru_cache(maxsize=64)
def look_up_table(levels: tuple[float, ...], bits: int, device: torch.device) -> Tensor:
    """The levels of all codes that one look-up brings: two floats as one float64, or four as one complex128."""
    count = {8: 1, 4: 2, 3: 4, 2: 4}[bits]
    index = torch.arange(2 ** (bits * count), device=device)
    if bits == 3:
        codes = [(index >> 2 * place & 3) | (index >> 8 + place & 1) << 2 for place in range(count)]
    else:
        codes = [index >> bits * place & 2**bits - 1 for place in range(count)]
    values = torch.tensor(levels, dtype=torch.float32, device=device)
    floats = torch.stack([values[code] for code in codes], dim=1)
    return floats.view({1: torch.float32, 2: torch.float64, 4: torch.complex128}[count]).view(-1)


@lru_cache(maxsize=8)
def _spread(device: torch.device) -> Tensor:
    """For a byte of top bits: its halves, each where bits 8 to 11 of an int32 index are, two indices in an int64."""
    byte = torch.arange(256, device=device)
    return (byte & 15) << 8 | byte >> 4 << 40


@torch.library.impl(LIBRARY, "code_attention", "CompositeExplicitAutograd")
def code_attention_chunked(
    query: Tensor,
    key_codes: Tensor,
    key_scale: Tensor,
    value_codes: Tensor,
    value_scale: Tensor,
    key_levels: Tensor,
    value_levels: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """Decodes some entries at a time, on any device; scores and sums in float32."""
    rows, heads, length, dim = query.shape
    blocks, entries = rows * heads, len(key_codes)
    tokens = entries // blocks
    folded = query.reshape(blocks, length, dim).to(torch.float32) * scale
    shift = None if bias is None else bias.reshape(blocks, length, 1).to(torch.float32) * scale
    if mask is not None:
        mask = mask.expand(rows, heads, length, tokens).reshape(blocks, length, tokens)
    turn = max(1, at_once(query.device, SCORES, GPU_SCORES) // max(1, entries))
    parts = []
    for first in range(0, length, turn):
        some = slice(first, first + turn)
        parts.append(
            _attend(
                folded[:, some],
                (key_codes, key_scale.view(blocks, 1, tokens), key_levels),
                (value_codes, value_scale.view(blocks, 1, tokens), value_levels),
                None if shift is None else shift[:, some],
                None if mask is None else mask[:, some],
                softcap,
            )
        )
    out, lse = parts[0] if len(parts) == 1 else (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
    return out.view(query.shape).to(query.dtype), lse.view(query.shape[:-1])


def _attend(
    query: Tensor,
    key: tuple[Tensor, Tensor, Tensor],
    value: tuple[Tensor, Tensor, Tensor],
    shift: Tensor | None,
    mask: Tensor | None,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """Attention of query `[P, M, D]`, scaled already; key and value are codes, scales `[P, 1, T]` and levels."""
    blocks, length, dim = query.shape
    codes, scales, levels = key
    tokens = scales.shape[2]
    scores = query.new_empty(blocks, length, tokens)
    for block, token, dense in _decoded(codes, levels, blocks, tokens, dim):
        torch.bmm(query[block], dense.transpose(1, 2), out=scores[block, :, token])
    scales = scales.to(torch.float32)
    scores *= scales.abs()
    if shift is not None:
        scores += shift * (scales > 0)
    if softcap > 0:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores.masked_fill_(~mask, -torch.inf) if mask.dtype == torch.bool else scores.add_(mask)
    # a row without a key: exp(-inf - lowest) = 0 instead of exp(-inf + inf) = nan
    top = scores.amax(dim=2, keepdim=True).clamp_min(torch.finfo(torch.float32).min)
    weights = scores.sub_(top).exp_()
    total = weights.sum(dim=2, keepdim=True)
    codes, scales, levels = value
    weights *= scales.to(torch.float32)
    out = torch.zeros_like(query)
    for block, token, dense in _decoded(codes, levels, blocks, tokens, dim):
        out[block].baddbmm_(weights[block, :, token], dense)
    out /= total.clamp_min(torch.finfo(torch.float32).tiny)
    return out, (total.log() + top).squeeze(2)


def _decoded(
    codes: Tensor, levels: Tensor, blocks: int, tokens: int, dim: int
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yields (blocks, tokens, decoded `[blocks, tokens, D]`) with about as many entries at a time as fit."""
    bits = (levels.numel() - 1).bit_length()
    table = look_up_table(tuple(levels.tolist()), bits, codes.device)
    most = at_once(codes.device, ENTRIES, GPU_ENTRIES)
    together = max(1, most // max(1, tokens))
    for block in range(0, blocks, together):
        count = min(together, blocks - block)
        for token in range(0, tokens, most):
            size = min(most, tokens - token)
            start = block * tokens + token
            found = _found(codes[start : start + count * size], table, bits)
            yield slice(block, block + count), slice(token, token + size), found.view(count, size, dim)


with_triton("code_attention", code_attention_chunked)


@torch.library.impl(LIBRARY, "code_attention", "Meta")
def _(query, key_codes, key_scale, value_codes, value_scale, key_levels, value_levels, bias, mask, scale, softcap):
    return torch.empty_like(query), query.new_empty(query.shape[:-1], dtype=torch.float32)


torch.library.register_autograd("hf_kvcache::code_attention", refuse_gradient("code_attention"), lib=LIBRARY)


def code_attention(
    query: Tensor,
    key: tuple[Tensor, Tensor, Tensor],
    value: tuple[Tensor, Tensor, Tensor],
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    scale: float,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Calls the operator. `key` and `value` are (codes, scales, levels); the module's first lines have the shapes."""
    arguments = (query, key[0], key[1], value[0], value[1], key[2], value[2], bias, mask, scale, softcap)
    if straight_to_cpu(query):
        return code_attention_chunked(*arguments)
    return torch.ops.hf_kvcache.code_attention(*arguments)
