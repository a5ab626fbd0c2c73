"""`Layout`: the order in which a segment stores its entries when every (row, KV head) keeps another number of them.

A *run* is what one (stored row, KV head) keeps. Runs of equal length lie one after the other, and attention reads them
as one rectangle. Otherwise every run is cut into full blocks of equal size and a remainder; all blocks come first, run
by run, then all remainders:

    runs  aaaaaaaaa bbbbb cccccc    blocks of 4    aaaa aaaa bbbb cccc | a b cc

So nothing is padded, and attention over any lengths is a rectangle of blocks, one small masked rectangle a row for the
remainders, and one merge of the partial results, however many heads there are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hf_kvcache.kernels.merge_states import merge_partials, merge_states
from hf_kvcache.kernels.ragged_attention import programs_of, work_list

# the attention over a block costs about as much a token as over a long run from here on
LARGEST_BLOCK = 256
SMALLEST_BLOCK = 16

CPU = torch.device("cpu")

# (work, parts, query [rows, heads, M, D]) -> out, lse, as `kernels/ragged_attention.py` has them
AttendRuns = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

# (first entry, (rows, heads, tokens), query, mask, runs of the query's heads) -> out, lse; as `Codec.attend`
AttendBlock = Callable[[int, tuple[int, int, int], Tensor, "Tensor | None", Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the entries of a segment lie.

    Args:
        lengths: tokens kept, `lengths[row][head]`, of every stored row.
    """

    lengths: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, lengths: Tensor) -> Layout:
        """The layout of `lengths` `[S, H_kv]`."""
        return cls(tuple(tuple(row) for row in lengths.tolist()))

    @property
    def runs(self) -> Tensor:
        """The lengths of all runs, `[S * H_kv]`."""
        return torch.tensor(self.lengths).flatten()

    @cached_property
    def entries(self) -> int:
        """How many entries there are."""
        return sum(map(sum, self.lengths))

    @property
    def rows(self) -> int:
        return len(self.lengths)

    @property
    def heads(self) -> int:
        return len(self.lengths[0])

    @cached_property
    def uniform(self) -> bool:
        """Whether all runs are equally long and not empty."""
        return self.lengths[0][0] > 0 and len({count for row in self.lengths for count in row}) == 1

    @cached_property
    def block(self) -> int:
        """Entries in a full block: a power of two, about a quarter of the mean run."""
        wanted = int(self.runs.sum()) // (4 * len(self.runs))
        return min(max(1 << max(wanted, 1).bit_length() - 1, SMALLEST_BLOCK), LARGEST_BLOCK)

    @property
    def blocks(self) -> Tensor:
        """The number of full blocks of every run."""
        return torch.zeros_like(self.runs) if self.uniform else self.runs // self.block

    # tensors are made when they are asked for: a layout lives as long as its segment, and only bytes that pay are kept.
    # They count entries, of which there may be a million: so they are made where the data is

    @property
    def owners(self) -> Tensor:
        """The run of every stored entry, `[N]`, on the CPU."""
        return self.owners_on(CPU)

    def owners_on(self, device: torch.device) -> Tensor:
        """`owners` on a device."""
        run = torch.arange(self.rows * self.heads, device=device)
        if self.uniform:
            return run.repeat_interleave(self.lengths[0][0])
        # runs, and what they hold, in full blocks and then in the remainders
        held = torch.cat(self._cut(device))
        return run.repeat(2).repeat_interleave(held, output_size=self.entries)

    def ranks_on(self, device: torch.device) -> Tensor:
        """The place of every stored entry within its run, `[N]`."""
        if self.uniform:
            return torch.arange(self.lengths[0][0], device=device).repeat(self.rows * self.heads)
        full, rest = self._cut(device)
        held, begin = torch.cat([full, rest]), torch.cat([torch.zeros_like(full), full])
        return torch.arange(self.entries, device=device) + (begin - (held.cumsum(0) - held)).repeat_interleave(
            held, output_size=self.entries
        )

    def order_on(self, device: torch.device) -> Tensor:
        """For every stored entry its place when the runs lie one after the other, `[N]`."""
        if self.uniform:
            return torch.arange(self.entries, device=device)
        runs = self.runs.to(device)
        return (runs.cumsum(0) - runs)[self.owners_on(device)] + self.ranks_on(device)

    def _cut(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """How many entries every run has in full blocks, and in its remainder."""
        full = self.blocks * self.block
        return full.to(device), (self.runs - full).to(device)

    def tensors(self) -> list[Tensor]:
        """The indices kept for attention."""
        plans = [plan.tensors() for plan in self._plans.values()]
        return [tensor for tensors in (*plans, *self._work.values()) for tensor in tensors]

    def padded(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The entries as a rectangle whose short runs begin late.

        Returns:
            index `[S, H_kv, T_max]` of stored entries, 0 where a run has none, and a mask that is True where it has.
        """
        runs = self.runs
        longest = int(runs.max())
        owner, rank = self.owners_on(device), self.ranks_on(device)
        index = torch.zeros(len(runs), longest, dtype=torch.long, device=device)
        valid = torch.zeros(len(runs), longest, dtype=torch.bool, device=device)
        column = longest - runs.to(device)[owner] + rank
        index[owner, column] = torch.arange(len(owner), device=device)
        valid[owner, column] = True
        return index.view(self.rows, self.heads, longest), valid.view(self.rows, self.heads, longest)

    def attend(
        self,
        attend_block: AttendBlock,
        query: Tensor,
        beside: tuple[Tensor, Tensor] | None = None,
        attend_runs: AttendRuns | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Partial attention of every run's own queries.

        Args:
            attend_block: attention over one rectangle of entries.
            query: `[S, H_kv, M, D]`.
            beside: a partial result over other entries, to be joined with; shapes as returned.
            attend_runs: a kernel for runs of unequal length, where there is one.

        Returns:
            out `[S, H_kv, M, D]` and lse `[S, H_kv, M]`; an empty run has out 0 and lse -inf.
        """
        if self.uniform:
            state = attend_block(0, (self.rows, self.heads, self.lengths[0][0]), query, None, None)
            return _joined(state, beside, query.dtype)
        if attend_runs is not None:
            return _joined(attend_runs(*self.work(query.device), query), beside, query.dtype)
        plan = self._plan(query.device)
        parts = []
        if len(plan.block_owner):
            shape = (len(plan.block_owner), 1, self.block)
            blocks = query.flatten(0, 1).index_select(0, plan.block_owner).unsqueeze(1)
            out, lse = attend_block(0, shape, blocks, None, plan.block_owner.unsqueeze(1))
            parts.append((out.squeeze(1), lse.squeeze(1)))
        for row, (start, mask, owners) in enumerate(plan.rests):
            if mask.shape[-1]:
                # all heads of a row look at the remainders of all of them, each through its own mask
                out, lse = attend_block(start, (1, 1, mask.shape[-1]), query[row : row + 1], mask, owners)
                parts.append((out.squeeze(0), lse.squeeze(0)))
        if beside is not None:
            parts.append((beside[0].flatten(0, 1), beside[1].flatten(0, 1)))
        if not parts:
            return torch.zeros_like(query), query.new_full(query.shape[:-1], -torch.inf, dtype=torch.float32)
        outs, lses = (torch.cat(part) for part in zip(*parts, strict=True))
        out, lse = merge_partials(outs, lses, plan.part_owner[: len(lses)], self.rows * self.heads + 1)
        return out[:-1].view(query.shape).to(query.dtype), lse[:-1].view(query.shape[:-1])

    def work(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The stretches of all runs, for a kernel that takes runs of unequal length: (work, parts)."""
        if device not in self._work:
            full = self.blocks * self.block
            rest = self.runs - full
            first = torch.cat([full.cumsum(0) - full, full.sum() + rest.cumsum(0) - rest])
            run, held = torch.arange(len(self.runs)).repeat(2), torch.cat([full, rest])
            made = work_list(run, first, first + held, len(self.runs), programs_of(device))
            self._work[device] = made[0].to(device), made[1].to(device)
        return self._work[device]

    @cached_property
    def _work(self) -> dict[torch.device, tuple[Tensor, Tensor]]:
        return {}

    def _plan(self, device: torch.device) -> _Plan:
        if device not in self._plans:
            self._plans[device] = self._make_plan(device)
        return self._plans[device]

    @cached_property
    def _plans(self) -> dict[torch.device, _Plan]:
        return {}

    def _make_plan(self, device: torch.device) -> _Plan:
        run, blocks = torch.arange(len(self.runs)), self.blocks
        rest = self.runs - blocks * self.block
        block_owner = run.repeat_interleave(blocks)
        # the partial results of a run: its blocks, its remainder, and what it is joined with
        part_owner = [block_owner]
        start = len(block_owner) * self.block
        rests = []
        for heads in run.view(self.rows, self.heads):
            owner = heads.repeat_interleave(rest[heads])
            mask = torch.zeros(1, self.heads, 1, len(owner)).masked_fill_(owner != heads[:, None, None], -torch.inf)
            rests.append((start, mask.to(device), heads[None].to(device)))
            start += len(owner)
            if len(owner):
                part_owner.append(torch.where(rest[heads] > 0, heads, len(run)))
        return _Plan(block_owner.to(device), rests, torch.cat([*part_owner, run]).to(device))


def _joined(
    state: tuple[Tensor, Tensor], beside: tuple[Tensor, Tensor] | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return (state[0].to(dtype), state[1]) if beside is None else merge_states(*state, *beside)


@dataclass(frozen=True)
class _Plan:
    """What attention over a ragged layout needs, on one device.

    Args:
        block_owner: the run of every full block.
        rests: for every row the first entry of its remainders, whose they are, as a mask `[1, H_kv, 1, entries]` of 0
            and -inf, and the row's runs `[1, H_kv]`.
        part_owner: the run of every partial result; the number of runs for one that is nobody's.
    """

    block_owner: Tensor
    rests: list[tuple[int, Tensor, Tensor]]
    part_owner: Tensor

    def tensors(self) -> list[Tensor]:
        """Everything kept."""
        return [self.block_owner, self.part_owner, *(tensor for _, *tensors in self.rests for tensor in tensors)]
