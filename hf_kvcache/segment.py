"""`Segment`: an immutable, sealed part of a layer's KV, ragged per (row, KV head).

A segment is written once and never changed: copies of a cache share it, beam search only changes which batch row reads
which stored row, and cropping or evicting makes a new one. Padding and evicted tokens never enter it, so attention over
it needs no mask.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hf_kvcache.codecs import CODECS, Codec, Payload
from hf_kvcache.codecs.codec import GatheringCodec, RaggedCodec
from hf_kvcache.kernels.library import uses_triton
from hf_kvcache.kernels.merge_states import merge_states
from hf_kvcache.layout import Layout
from hf_kvcache.stores import Store

# held beside what the codec makes of keys and values: the column of every entry, when there are gaps between them
POSITIONS = "positions"


def places_of(mask: Tensor, count: int) -> Tensor:
    """Where a mask `[N]` is True, `count` times: `nonzero`, which on a GPU would wait for it to say how often."""
    return mask.nonzero()[:, 0] if mask.device.type == "cpu" else counted_places(mask, count)


def counted_places(mask: Tensor, count: int) -> Tensor:
    """`places_of` on a GPU."""
    # what is not wanted goes to a place of its own, behind the others
    target = torch.where(mask, mask.cumsum(0) - 1, count)
    found = torch.empty(count + 1, dtype=torch.long, device=mask.device)
    return found.scatter_(0, target, torch.arange(len(mask), device=mask.device))[:count]


@dataclass(frozen=True, eq=False)
class Segment:
    """Sealed keys and values of one producer layer.

    Args:
        codec: how the entries are stored.
        store: where they are stored.
        held: what the store keeps: the codec's payload; `positions` `[N]` when some token was dropped; and further
            values of every entry `[N]` that eviction carries along.
        layout: how many tokens every stored (row, head) keeps, and where they lie.
        rows: for every row of the batch the stored row that it reads. Beams and samples of one prompt read one row.
        start: the column of the first token that this segment covers.
        seen: tokens of the sequence that it covers, padding and dropped ones included.
        device: of the layer, where attention runs.
    """

    codec: Codec
    store: Store
    held: Payload
    layout: Layout
    rows: tuple[int, ...]
    start: int
    seen: int
    device: torch.device

    @property
    def lengths(self) -> tuple[tuple[int, ...], ...]:
        """Tokens kept, `lengths[row][head]`, of every stored row."""
        return self.layout.lengths

    @classmethod
    def seal(
        cls,
        codec: Codec,
        store: Store,
        key: Tensor,
        value: Tensor,
        keep: Tensor | None = None,
        copies: int = 1,
        start: int = 0,
        carried: Mapping[str, Tensor] | None = None,
        like: Segment | None = None,
    ) -> Segment:
        """Encodes key and value `[B, H_kv, T, D]`.

        Args:
            codec, store: how and where to keep them.
            key, value: dense keys and values of all rows.
            keep: `[B, H_kv or 1, T]`, False for what is left out: padding and evicted tokens; None to keep all.
            copies: how many consecutive rows of the batch are copies of one prompt (beams, returned sequences); only
                the first of them is kept.
            start: the column of the first token.
            carried: further values of every entry, `[B, H_kv, T]` by name.
            like: a segment of the same stored rows, to encode like it and be joined with it.
        """
        batch, heads, tokens, _ = key.shape
        if batch % copies:
            raise ValueError(f"the batch must hold {copies} copies of each prompt, but has {batch} rows")
        key, value = key.detach()[::copies], value.detach()[::copies]
        carried = {name: tensor[::copies] for name, tensor in (carried or {}).items()}
        keep = None if keep is None else keep[::copies].expand(len(key), heads, tokens)
        model = None if like is None else like.payload()
        layout = Layout(((tokens,) * heads,) * len(key)) if keep is None else Layout.of(keep.sum(-1))
        if keep is None or layout.entries == keep.numel():
            key, value = key.reshape(-1, key.shape[-1]), value.reshape(-1, value.shape[-1])
            owners = torch.arange(layout.rows * heads, device=key.device)[:, None].expand(-1, tokens)
            held = codec.encode(key, value, owners, model)
            held |= {name: tensor.reshape(-1) for name, tensor in carried.items()}
        else:
            kept = places_of(keep.flatten().to(key.device), layout.entries)[layout.order_on(key.device)]
            row, head, column = kept // (heads * tokens), kept // tokens % heads, kept % tokens
            owners = row * heads + head
            if isinstance(codec, GatheringCodec) and uses_triton(key):
                held = codec.encode_chosen(key, value, kept, owners, model)
            else:
                held = codec.encode(key[row, head, column], value[row, head, column], owners, model)
            held[POSITIONS] = (column + start).to(torch.int32)
            held |= {name: tensor[row, head, column] for name, tensor in carried.items()}
        rows = tuple(row // copies for row in range(batch))
        return cls(codec, store, store.put(held), layout, rows, start, tokens, key.device)

    def continues(self, codec: Codec, batch: int) -> bool:
        """Whether what `codec` makes of a batch of so many rows can be encoded like this segment and joined with it.

        A loaded segment may have been saved under another codec, or another seed of this one.
        """
        return self.codec == codec and self.rows == tuple(range(batch)) and self.layout.rows == batch

    @classmethod
    def join(cls, segments: Sequence[Segment], keep: Tensor | None = None) -> Segment:
        """One segment of several consecutive ones that hold the same stored rows; no entry is encoded anew.

        Args:
            segments: in the order of the sequence, of one codec and store.
            keep: `[N]`, the entries to keep, counted through all segments in turn; None for all of them.
        """
        first, last = segments[0], segments[-1]
        device, end = first.device, last.start + last.seen
        gapless = all(POSITIONS not in segment.held for segment in segments) and keep is None
        payloads = [
            segment.payload()
            if gapless
            else {**segment.payload(), POSITIONS: segment.positions().to(device, torch.int32)}
            for segment in segments
        ]
        if keep is None and all(segment.layout.uniform for segment in segments):
            # every flush of a long context comes here: an index of all its entries would cost more than moving them
            tokens = sum(segment.layout.lengths[0][0] for segment in segments)
            layout = Layout(((tokens,) * first.layout.heads,) * first.layout.rows)
            held = first.codec.join(payloads, first.layout.rows * first.layout.heads)
            return replace(first, held=first.store.put(held), layout=layout, seen=end - first.start)
        run = torch.cat([segment.layout.owners_on(device) for segment in segments])
        column = torch.cat([segment.positions().to(device) for segment in segments])
        chosen = torch.arange(len(run), device=device) if keep is None else keep.to(device).nonzero()[:, 0]
        lengths = run[chosen].bincount(minlength=first.layout.rows * first.layout.heads)
        layout = Layout.of(lengths.view(first.layout.rows, first.layout.heads))
        # runs one after the other, each in the order of the sequence; then as the layout stores them
        chosen = chosen[(run[chosen] * end + column[chosen]).argsort()][layout.order_on(device)]
        whole = first.codec.join(payloads) if len(payloads) > 1 else payloads[0]
        held = first.codec.select(whole, chosen)
        return replace(first, held=first.store.put(held), layout=layout, seen=end - first.start)

    def attend(
        self, query: Tensor, scale: float, softcap: float, beside: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Partial attention of query `[B, H_kv, M, D]`, the group folded into M, over all kept tokens, joined with the
        partial result `beside`.

        Returns:
            out `[B, H_kv, M, D]` and lse `[B, H_kv, M]`; a row without tokens has out 0 and lse -inf.
        """
        payload = self.payload()

        def attend_block(start: int, shape: tuple[int, int, int], part: Tensor, mask: Tensor | None, owners: Tensor):
            return self.codec.attend(payload, start, shape, part, scale, softcap, mask, owners)

        by_runs = None
        ragged = not self.layout.uniform
        if ragged and isinstance(self.codec, RaggedCodec) and self.codec.attends_runs(payload, query):
            by_runs = partial(self.codec.attend_runs, payload, scale=scale, softcap=softcap)
        if self.rows == tuple(range(self.layout.rows)):
            return self.layout.attend(attend_block, query, beside, by_runs)
        # the batch rows that read one stored row become further rows of its query
        stored = torch.tensor(self.rows, device=query.device)
        place = torch.tensor([self.rows[:row].count(source) for row, source in enumerate(self.rows)])
        readers = int(place.max()) + 1
        place = place.to(query.device)
        folded = query.new_zeros(self.layout.rows, readers, *query.shape[1:])
        folded[stored, place] = query
        out, lse = self.layout.attend(attend_block, folded.transpose(1, 2).flatten(2, 3), attend_runs=by_runs)
        spread = (readers, query.shape[2])
        out, lse = out.unflatten(2, spread), lse.unflatten(2, spread)
        out, lse = out[stored, :, place], lse[stored, :, place]
        return (out, lse) if beside is None else merge_states(out, lse, *beside)

    def select_rows(self, rows: list[int]) -> Segment:
        """The segment whose batch row i is this one's row `rows[i]`; no entry is moved or copied."""
        return replace(self, rows=tuple(self.rows[row] for row in rows))

    def expanded(self) -> Segment:
        """The segment with a stored row of its own for every row of the batch."""
        if self.rows == tuple(range(self.layout.rows)):
            return self
        lengths = tuple(self.layout.lengths[row] for row in self.rows)
        layout = Layout(lengths)
        # entries of this segment, run after run, and where each run begins there
        device = self.device
        canonical = self.layout.order_on(device).argsort()
        first = (self.layout.runs.cumsum(0) - self.layout.runs).to(device)
        source = torch.tensor(self.rows)[:, None] * self.layout.heads + torch.arange(self.layout.heads)
        index = canonical[first[source.flatten().to(device)[layout.owners_on(device)]] + layout.ranks_on(device)]
        held = self.codec.select(self.payload(), index, source.flatten())
        return replace(self, held=self.store.put(held), layout=layout, rows=tuple(range(len(self.rows))))

    def crop(self, tokens: int) -> Segment | None:
        """The segment without the last `tokens` tokens that it covers, None when nothing is left."""
        if tokens >= self.seen:
            return None
        rest = self.seen - tokens
        joined = Segment.join([self], self.positions() < self.start + rest)
        return replace(joined, seen=rest)

    def tensors(self) -> list[Tensor]:
        """Every tensor that this segment keeps alive, indices included."""
        return [*self.held.values(), *self.layout.tensors()]

    def payload(self) -> Payload:
        """What is held, on the device of the layer."""
        return self.store.get(self.held, self.device)

    def positions(self) -> Tensor:
        """The column of every entry in the sequence, `[N]`."""
        if POSITIONS in self.held:
            return self.held[POSITIONS].long()
        return self.layout.ranks_on(self.device) + self.start

    def padded(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """All entries, decoded, as rectangles whose short runs begin late.

        Returns:
            key and value `[S, H_kv, T_max, D]`, the index `[S, H_kv, T_max]` of the entry in each place, and a mask of
            that shape, False where there is none.
        """
        key, value = self.codec.decode(self.payload(), self.layout.owners_on(self.device))
        index, valid = self.layout.padded(key.device)
        return key[index], value[index], index, valid

    def dense(self) -> list[list[tuple[Tensor, Tensor]]]:
        """The kept keys and values, decoded: `[stored row][head] -> (key [T, D], value [T, D])`."""
        key, value, _, valid = self.padded()
        return [
            [(key[row, head][mask], value[row, head][mask]) for head, mask in enumerate(heads)]
            for row, heads in enumerate(valid)
        ]

    def describe(self) -> dict[str, Any]:
        """All but the tensors, as JSON can hold it."""
        codec: Any = self.codec
        options = {option.name: getattr(codec, option.name) for option in fields(codec)}
        return {
            "codec": {"name": codec.name, "options": options},
            "lengths": self.layout.lengths,
            "rows": self.rows,
            "start": self.start,
            "seen": self.seen,
        }

    @classmethod
    def restore(
        cls, described: dict[str, Any], payload: Payload, own: Codec, store: Store, device: torch.device
    ) -> Segment:
        """The inverse of `describe`, with the tensors held; `own` is the codec of the patched model."""
        name, options = described["codec"]["name"], described["codec"]["options"]
        if name != own.name and name not in CODECS:
            raise ValueError(
                f"the cache was saved with the codec {name!r}, expected {own.name!r} or one of {', '.join(CODECS)}; "
                "patch the model with the method that made it"
            )
        codec = (type(own) if name == own.name else CODECS[name])(**options)
        layout = Layout(tuple(tuple(row) for row in described["lengths"]))
        held = store.put({name: tensor.to(device) for name, tensor in payload.items()})
        return cls(codec, store, held, layout, tuple(described["rows"]), described["start"], described["seen"], device)

    def __deepcopy__(self, memo) -> Segment:
        return self
