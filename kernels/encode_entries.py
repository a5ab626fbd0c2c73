"""`encode_entries`: keys and values to the packed codes that `code_attention` reads.

    y = x R                        keys: y - mean R, where that is the shorter of the two
    codes, s = argmin | y - s levels[codes] |     over a few scales around the norm, each refitted to its codes

The two bytes in which TurboQuant keeps a vector's norm hold a better number: of a few scales around the norm the one
whose codes, with the scale then refitted to them by least squares, leave the least error. Refitting alone is what is
known as norm correction. Decoding costs the same.

Shapes: key and value `[B, H, T, D]`; index `[N]` chooses entries b H T + h T + t, None takes all in order; owners `[N]`
says whose entry each is, None when all are one owner's; mean `[owners, D]` or None to keep it; rotation `[D, D]`;
levels `[2^bits]`, ascending and symmetric, for coordinates of variance 1; factors: scales to try, in root mean squares
of the vector. Returns for keys and for values codes uint8 `[N, D * bits / 8]` and scales float32 `[N]`, rounded to
float16 where it holds them. A key's scale is positive when the mean was removed from it, and else not.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

from hf_kvcache.kernels.code_attention import pack
from hf_kvcache.kernels.library import LIBRARY, at_once, straight_to_cpu, with_triton

# steps of the table of nearest levels in a root mean square: they miss only where two levels are nearly as near
STEPS = 256
# vectors at once: what is in work stays in the cache of the processor
ROWS = 1024
# the same on a GPU, which a launch of so few would leave idle
GPU_ROWS = 1 << 18
# norm of a vector that counts as zero: its reciprocal is still finite
LEAST = 1e-30
# the least scale of float16: zero would say that the mean was kept
SMALLEST = 2.0**-24

LIBRARY.define(
    "encode_entries(Tensor key, Tensor value, Tensor? index, Tensor? owners, Tensor? mean, Tensor rotation,"
    " Tensor key_levels, Tensor value_levels, float[] key_factors, float[] value_factors)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)


@torch.library.impl(LIBRARY, "encode_entries", "CompositeExplicitAutograd")
def encode_entries_reference(
    key: Tensor, value: Tensor, index: Tensor | None, owners: Tensor | None, mean: Tensor | None, rotation: Tensor,
    key_levels: Tensor, value_levels: Tensor, key_factors: list[float], value_factors: list[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """In plain PyTorch, in float32, on any device."""
    rotated, values = (chosen(tensor, index).to(torch.float32) @ rotation for tensor in (key, value))
    if mean is not None:
        centred = rotated - of_owners(mean.to(torch.float32) @ rotation, owners, len(rotated))
        # the error is in proportion to the norm
        nearer = torch.linalg.vecdot(centred, centred) <= torch.linalg.vecdot(rotated, rotated)
        rotated = torch.where(nearer[:, None], centred, rotated)
    key_codes, key_scale, _ = quantise(rotated, key_levels, tuple(key_factors))
    if mean is not None:
        # zero says that the mean was kept; a key that is the mean gets the least scale there is instead
        key_scale = torch.where(nearer, key_scale.clamp_min(SMALLEST), -key_scale)
    value_codes, value_scale, _ = quantise(values, value_levels, tuple(value_factors))
    return (
        pack(key_codes, bits_of(key_levels)),
        key_scale,
        pack(value_codes, bits_of(value_levels)),
        value_scale,
    )


def chosen(tensor: Tensor, index: Tensor | None) -> Tensor:
    """The chosen entries `[N, D]`."""
    if index is None:
        return tensor.flatten(0, 2)
    _, heads, tokens, _ = tensor.shape
    return tensor[index // (heads * tokens), index // tokens % heads, index % tokens]


def of_owners(means: Tensor, owners: Tensor | None, entries: int) -> Tensor:
    """The mean of every entry's owner, `[entries, D]`."""
    if owners is None:
        return means[:1].expand(entries, -1)
    # owners behind the last one that had an entry use its mean, as good as any
    return means[owners.to(means.device).clamp(max=len(means) - 1)]


def bits_of(levels: Tensor) -> int:
    return (levels.numel() - 1).bit_length()


def quantise(x: Tensor, levels: Tensor, factors: tuple[float, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Quantises the rows of x to `scale * levels[code]`.

    Args:
        x: float32 `[N, D]`.
        levels: `[2^bits]`, ascending, symmetric, for coordinates of variance 1.
        factors: scales to try, in root mean squares of the row.

    Returns:
        codes, uint8 `[N, D]`; scales, float32 `[N]`, rounded to float16 where it holds them; and squared errors `[N]`.
    """
    parts = [_quantise(rows, levels, factors) for rows in x.split(at_once(x.device, ROWS, GPU_ROWS))]
    codes, scales, errors = (torch.cat(part) for part in zip(*parts, strict=True))
    return codes, scales, errors


def _quantise(x: Tensor, levels: Tensor, factors: tuple[float, ...]) -> tuple[Tensor, Tensor, Tensor]:
    # no coordinate is larger than all of its row, so that nothing needs to be clamped
    reach = math.ceil(x.shape[1] ** 0.5 / min(factors)) + 1
    codes_of, levels_of = _nearest(tuple(levels.tolist()), reach, x.device)
    energy = torch.linalg.vecdot(x, x)
    size = (energy / x.shape[1]).sqrt()
    best_codes = best_scale = best_error = None
    for factor in factors:
        unit = x * (STEPS / factor / size.clamp_min(LEAST))[:, None]
        place = unit.add_(reach * STEPS + 0.5).to(torch.int32).view(-1)
        if x.device.type != "cpu":
            # what is not finite shows in the scale; as an index it would end the whole process there
            place.clamp_(0, len(levels_of) - 1)
        level = torch.index_select(levels_of, 0, place).view(x.shape)
        along, length = torch.linalg.vecdot(level, x), torch.linalg.vecdot(level, level)
        scale = _rounded(along / length)
        error = energy - 2 * scale * along + scale.square() * length
        if best_error is None:
            best_place, best_scale, best_error = place.view(x.shape), scale, error
        else:
            better = error < best_error
            best_place = torch.where(better[:, None], place.view(x.shape), best_place)
            best_scale, best_error = torch.where(better, scale, best_scale), torch.where(better, error, best_error)
    best_codes = torch.index_select(codes_of, 0, best_place.reshape(-1)).view(x.shape)
    return best_codes, best_scale, best_error


def _rounded(scale: Tensor) -> Tensor:
    """The scales as float16 holds them; those that it cannot hold stay as they are."""
    half = scale.to(torch.float16).to(torch.float32)
    return torch.where(half.isfinite(), half, scale)


@lru_cache(maxsize=64)
def _nearest(levels: tuple[float, ...], reach: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """For every step of [-reach, reach] the code of the nearest level and the level itself."""
    exact = torch.tensor(levels, dtype=torch.float64)
    steps = torch.arange(2 * reach * STEPS + 1, dtype=torch.float64) / STEPS - reach
    codes = torch.bucketize(steps, (exact[1:] + exact[:-1]) / 2)
    return codes.to(torch.uint8).to(device), exact[codes].to(torch.float32).to(device)


with_triton("encode_entries", encode_entries_reference)


@torch.library.impl(LIBRARY, "encode_entries", "Meta")
def _(key, value, index, owners, mean, rotation, key_levels, value_levels, key_factors, value_factors):
    entries = key.shape[0] * key.shape[1] * key.shape[2] if index is None else index.shape[0]
    made = []
    for levels in (key_levels, value_levels):
        made.append(key.new_empty(entries, key.shape[3] * bits_of(levels) // 8, dtype=torch.uint8))
        made.append(key.new_empty(entries, dtype=torch.float32))
    return tuple(made)


def encode_entries(
    key: Tensor,
    value: Tensor,
    index: Tensor | None,
    owners: Tensor | None,
    mean: Tensor | None,
    rotation: Tensor,
    levels: tuple[Tensor, Tensor],
    factors: tuple[tuple[float, ...], tuple[float, ...]],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Calls the operator; levels and factors are those of keys and of values. The module's first lines say the rest."""
    arguments = (key, value, index, owners, mean, rotation, *levels, *map(list, factors))
    if straight_to_cpu(key):
        return encode_entries_reference(*arguments)
    return torch.ops.hf_kvcache.encode_entries(*arguments)
