"""`ragged_decode_attention`, `ragged_code_attention`: attention over runs of unequal length, by a list of work.

A run is what one (row, KV head) keeps, and each has queries of its own. The list cuts all runs into *stretches* of
about equal length, so that a run costs what its entries cost, however long the others are. Stretches are attended
independently and joined by their log-sum-exp.

Shapes: query `[R, H, M, D]`, a run for each of R * H; entries `[N, ...]` as `decode_attention` and `code_attention`
take them, in any order of runs; work int32 `[S, 3]`: (run, first entry, end) of every stretch, run by run; parts int32
`[R * H + 1]`: where the stretches of every run begin. Returns out `[R, H, M, D]` in the dtype of the query and lse
`[R, H, M]` in float32; a run without entries has out 0 and lse -inf.

The PyTorch versions go through the list one by one: they define the result. `Layout` has a faster way on CPUs.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from hf_kvcache.kernels.code_attention import code_attention_chunked
from hf_kvcache.kernels.decode_attention import decode_attention_reference
from hf_kvcache.kernels.library import LIBRARY, refuse_gradient, with_triton
from hf_kvcache.kernels.merge_states import merge_states_reference

# entries that a stretch is a multiple of, and is at least
TILE = 128
LEAST = 2 * TILE
# stretches on a multiprocessor at once
PROGRAMS = 12

LIBRARY.define(
    "ragged_decode_attention(Tensor query, Tensor key, Tensor value, Tensor work, Tensor parts, float scale,"
    " float softcap) -> (Tensor, Tensor)"
)
LIBRARY.define(
    "ragged_code_attention(Tensor query, Tensor key_codes, Tensor key_scale, Tensor value_codes, Tensor value_scale,"
    " Tensor key_levels, Tensor value_levels, Tensor? bias, Tensor work, Tensor parts, float scale, float softcap)"
    " -> (Tensor, Tensor)"
)


def programs_of(device: torch.device) -> int:
    """How many stretches a device attends to at once; elsewhere than on a GPU few, so that tests see several."""
    if device.type != "cuda":
        return 6
    return PROGRAMS * torch.cuda.get_device_properties(device).multi_processor_count


def work_list(run: Tensor, first: Tensor, end: Tensor, runs: int, programs: int) -> tuple[Tensor, Tensor]:
    """Cuts ranges of entries into stretches.

    Args:
        run, first, end: `[K]`, of every range its run, its first entry and the one after its last. A run may have
            several ranges, or none.
        runs: how many runs there are.
        programs: how many stretches to aim at.

    Returns:
        work `[S, 3]` and parts `[runs + 1]`, int32, as the operators take them.
    """
    # cuts at multiples of TILE of all entries, so that only the ends of a range need a mask
    begin = first // TILE * TILE
    length = max(LEAST, -(-int((end - begin).sum()) // (programs * TILE)) * TILE)
    count = torch.where(end > first, (end - begin + length - 1) // length, 0)
    source = torch.arange(len(run)).repeat_interleave(count)
    number = torch.arange(len(source)) - (count.cumsum(0) - count)[source]
    start = begin[source] + number * length
    work = torch.stack(
        [run[source], torch.maximum(start, first[source]), torch.minimum(start + length, end[source])], 1
    )
    work = work[run[source].argsort(stable=True)]
    members = torch.bincount(run[source], minlength=runs)
    parts = torch.cat([members.new_zeros(1), members.cumsum(0)])
    return work.to(torch.int32), parts.to(torch.int32)


def _by_stretch(
    query: Tensor, work: Tensor, width: int, attend: Callable[[int, int, int], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Joins attend(run, first entry, end) of all stretches."""
    out = query.new_zeros(*query.shape[:-1], width)
    lse = query.new_full(query.shape[:-1], -torch.inf, dtype=torch.float32)
    for run, first, end in work.tolist():
        place = divmod(run, query.shape[1])
        if end > first:
            part, part_lse = attend(run, first, end)
            out[place], lse[place] = merge_states_reference(out[place], lse[place], part[0, 0], part_lse[0, 0].float())
    return out, lse


@torch.library.impl(LIBRARY, "ragged_decode_attention", "CompositeExplicitAutograd")
def ragged_decode_attention_reference(
    query: Tensor, key: Tensor, value: Tensor, work: Tensor, parts: Tensor, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    runs = query.flatten(0, 1)

    def attend(run: int, first: int, end: int) -> tuple[Tensor, Tensor]:
        some = slice(first, end)
        return decode_attention_reference(
            runs[None, run : run + 1], key[None, None, some], value[None, None, some], None, scale, softcap
        )

    return _by_stretch(query, work, value.shape[-1], attend)


@torch.library.impl(LIBRARY, "ragged_code_attention", "CompositeExplicitAutograd")
def ragged_code_attention_reference(
    query: Tensor, key_codes: Tensor, key_scale: Tensor, value_codes: Tensor, value_scale: Tensor, key_levels: Tensor,
    value_levels: Tensor, bias: Tensor | None, work: Tensor, parts: Tensor, scale: float, softcap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    runs = query.flatten(0, 1)
    shift = None if bias is None else bias.flatten(0, 1)

    def attend(run: int, first: int, end: int) -> tuple[Tensor, Tensor]:
        entries = (tensor[first:end] for tensor in (key_codes, key_scale, value_codes, value_scale))
        own = None if shift is None else shift[None, run : run + 1]
        return code_attention_chunked(
            runs[None, run : run + 1], *entries, key_levels, value_levels, own, None, scale, softcap
        )

    return _by_stretch(query, work, query.shape[-1], attend)


with_triton("ragged_decode_attention", ragged_decode_attention_reference, file="ragged_attention")
with_triton("ragged_code_attention", ragged_code_attention_reference, file="ragged_attention")


@torch.library.impl(LIBRARY, "ragged_decode_attention", "Meta")
def _(query, key, value, work, parts, scale, softcap):
    return query.new_empty(*query.shape[:-1], value.shape[-1]), query.new_empty(query.shape[:-1], dtype=torch.float32)


@torch.library.impl(LIBRARY, "ragged_code_attention", "Meta")
def _(
    query, key_codes, key_scale, value_codes, value_scale, key_levels, value_levels, bias, work, parts, scale, softcap
):
    return torch.empty_like(query), query.new_empty(query.shape[:-1], dtype=torch.float32)


for _op in ("ragged_decode_attention", "ragged_code_attention"):
    torch.library.register_autograd(f"hf_kvcache::{_op}", refuse_gradient(_op), lib=LIBRARY)


def ragged_decode_attention(
    query: Tensor, key: Tensor, value: Tensor, work: Tensor, parts: Tensor, *, scale: float, softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Calls the operator: key and value `[N, D]`. The module's first lines have the other shapes."""
    return torch.ops.hf_kvcache.ragged_decode_attention(query, key, value, work, parts, scale, softcap)


def ragged_code_attention(
    query: Tensor,
    key: tuple[Tensor, Tensor, Tensor],
    value: tuple[Tensor, Tensor, Tensor],
    work: Tensor,
    parts: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Calls the operator: `key` and `value` are (codes, scales, levels), as `code_attention` takes them."""
    arguments = (query, key[0], key[1], value[0], value[1], key[2], value[2], bias, work, parts, scale, softcap)
    return torch.ops.hf_kvcache.ragged_code_attention(*arguments)
