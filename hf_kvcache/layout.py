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
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from hf_kvcache.kernels.merge_states import merge_partials

# the attention over a block costs about as much a token as over a long run from here on
LARGEST_BLOCK = 256
SMALLEST_BLOCK = 16

# (first entry, (rows, heads, tokens), query [rows, heads, M, D], mask, run of each part or query) -> out, lse
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

    # tensors are made when they are asked for: a layout lives as long as its segment, and only bytes that pay are kept

    @property
    def owners(self) -> Tensor:
        """The run of every stored entry, `[N]`."""
        run = torch.arange(len(self.runs))
        if self.uniform:
            return run.repeat_interleave(self.runs)
        full = self.blocks * self.block
        return torch.cat([run.repeat_interleave(full), run.repeat_interleave(self.runs - full)])

    @property
    def ranks(self) -> Tensor:
        """The place of every stored entry within its run, `[N]`."""
        if self.uniform:
            return _count_up(self.runs)
        full = self.blocks * self.block
        rest = self.runs - full
        return torch.cat([_count_up(full), full.repeat_interleave(rest) + _count_up(rest)])

    @property
    def order(self) -> Tensor:
        """For every stored entry its place when the runs lie one after the other, `[N]`."""
        return (self.runs.cumsum(0) - self.runs)[self.owners] + self.ranks

    def tensors(self) -> list[Tensor]:
        """The indices kept for attention."""
        return [tensor for plan in self._plans.values() for tensor in plan.tensors()]

    def padded(self) -> tuple[Tensor, Tensor]:
        """The entries as a rectangle whose short runs begin late.

        Returns:
            index `[S, H_kv, T_max]` of stored entries, 0 where a run has none, and a mask that is True where it has.
        """
        longest = int(self.runs.max())
        owner, rank = self.owners, self.ranks
        index = torch.zeros(len(self.runs), longest, dtype=torch.long)
        valid = torch.zeros(len(self.runs), longest, dtype=torch.bool)
        column = longest - self.runs[owner] + rank
        index[owner, column] = torch.arange(len(owner))
        valid[owner, column] = True
        return index.view(self.rows, self.heads, longest), valid.view(self.rows, self.heads, longest)

    def attend(self, attend_block: AttendBlock, query: Tensor) -> tuple[Tensor, Tensor]:
        """Partial attention of every run's own queries.

        Args:
            attend_block: attention over one rectangle of entries.
            query: `[S, H_kv, M, D]`.

        Returns:
            out `[S, H_kv, M, D]` and lse `[S, H_kv, M]`; an empty run has out 0 and lse -inf.
        """
        if self.uniform:
            owners = torch.arange(self.rows * self.heads, device=query.device).view(self.rows, self.heads)
            return attend_block(0, (self.rows, self.heads, self.lengths[0][0]), query, None, owners)
        plan = self._plan(query.device)
        by_run, queries = query.flatten(0, 1), query.shape[2]
        outs, lses = [], []
        if len(plan.block_owner):
            shape = (len(plan.block_owner), 1, self.block)
            part = by_run[plan.block_owner].unsqueeze(1)
            out, lse = attend_block(0, shape, part, None, plan.block_owner.unsqueeze(1))
            outs.append(out.squeeze(1))
            lses.append(lse.squeeze(1))
        for row, (start, mask, owner) in enumerate(plan.rests_for(queries)):
            # all heads of a row look at the remainders of all of them, each through its own mask
            columns = mask.shape[-1]
            if not columns:
                out, lse = torch.zeros_like(query[row]), query.new_full(query.shape[1:3], -torch.inf)
            else:
                flat = query[row].reshape(1, 1, -1, query.shape[-1])
                out, lse = attend_block(start, (1, 1, columns), flat, mask, owner)
                out, lse = out.view(query[row].shape), lse.view(query.shape[1:3])
            outs.append(out)
            lses.append(lse)
        out, lse = merge_partials(torch.cat(outs), torch.cat([part.float() for part in lses]), plan.owned)
        return out.view(query.shape), lse.reshape(query.shape[:-1])

    def _plan(self, device: torch.device) -> _Plan:
        if device not in self._plans:
            self._plans[device] = self._make_plan(device)
        return self._plans[device]

    @cached_property
    def _plans(self) -> dict[torch.device, _Plan]:
        return {}

    def _make_plan(self, device: torch.device) -> _Plan:
        rest = (self.runs - self.blocks * self.block).view(self.rows, self.heads)
        count = int(self.blocks.sum())
        start = count * self.block
        rests = []
        for row in range(self.rows):
            owner = torch.arange(self.heads).repeat_interleave(rest[row])
            rests.append((start, (owner == torch.arange(self.heads)[:, None]).to(device)))
            start += len(owner)
        # every run merges its blocks and its remainder; the remainders of all runs follow the blocks
        run = torch.arange(len(self.runs))
        block_owner = run.repeat_interleave(self.blocks)
        part_owner = torch.cat([block_owner, torch.where(rest.flatten() > 0, run, -1)])
        owned = torch.zeros(len(run), len(part_owner)).masked_fill_(part_owner != run[:, None], -torch.inf)
        return _Plan(block_owner.to(device), rests, owned.to(device))


@dataclass(frozen=True)
class _Plan:
    """What attention over a ragged layout needs, on one device.

    Args:
        block_owner: the run of every full block.
        rests: for every row the first entry of its remainders and whose they are, `[H_kv, entries]`.
        owned: for every run which of all partial results are its own, `[runs, partial results]`, 0 or -inf.
    """

    block_owner: Tensor
    rests: list[tuple[int, Tensor]]
    owned: Tensor
    _wide: dict[int, list[tuple[int, Tensor, Tensor]]] = field(default_factory=dict)

    def rests_for(self, queries: int) -> list[tuple[int, Tensor, Tensor]]:
        """The remainders for `queries` queries a head: first entry, mask `[1, 1, H_kv * queries, entries]` and the run
        of every query `[1, 1, H_kv * queries]`. Those of the last number asked for are kept: decoding repeats it."""
        if queries not in self._wide:
            self._wide.clear()
            wide = []
            for row, (start, mask) in enumerate(self.rests):
                owner = torch.arange(row * len(mask), (row + 1) * len(mask), device=mask.device)
                spread = mask.repeat_interleave(queries, 0)[None, None]
                wide.append((start, spread, owner.repeat_interleave(queries)[None, None]))
            self._wide[queries] = wide
        return self._wide[queries]

    def tensors(self) -> list[Tensor]:
        """Everything kept."""
        wide = [tensor for rests in self._wide.values() for _, mask, owner in rests for tensor in (mask, owner)]
        return [self.block_owner, self.owned, *(mask for _, mask in self.rests), *wide]


def _count_up(counts: Tensor) -> Tensor:
    """0 .. count - 1 for every count, one after the other."""
    first = (counts.cumsum(0) - counts).repeat_interleave(counts)
    return torch.arange(len(first)) - first
