"""`Segment`: an immutable, sealed part of a layer's KV, ragged per (row, KV head).

A segment is written once, by `Segment.seal`, and never changed: copies of a cache share it, beam search only changes
which batch row reads which stored row, and cropping makes a new one. Padding never enters it, so attention over it
needs no mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from hf_kvcache.codecs import CODECS, Codec, Payload
from hf_kvcache.stores import Store


@dataclass(frozen=True, eq=False)
class Segment:
    """Sealed keys and values of one producer layer.

    Args:
        codec: how the entries are stored.
        store: where they are stored.
        held: what the store keeps, with entries in the order (stored row, head, token).
        lengths: tokens kept, `lengths[row][head]`, of every stored row.
        rows: for every row of the batch the stored row that it reads. Beams and samples of one prompt read one row.
        seen: tokens of the sequence that this segment covers, padding and dropped ones included.
        padded: for every stored row how many of its last tokens were padding.
        device: of the layer, where attention runs.
    """

    codec: Codec
    store: Store
    held: Payload
    lengths: tuple[tuple[int, ...], ...]
    rows: tuple[int, ...]
    seen: int
    padded: tuple[int, ...]
    device: torch.device

    @classmethod
    def seal(
        cls, codec: Codec, store: Store, key: Tensor, value: Tensor, valid: Tensor | None = None, copies: int = 1
    ) -> Segment:
        """Encodes key and value `[B, H_kv, T, D]`.

        Args:
            codec, store: how and where to keep them.
            key, value: dense keys and values of all rows.
            valid: `[B, T]`, False for padding, which is left out; None when there is none.
            copies: how many consecutive rows of the batch are copies of one prompt (beams, returned sequences); only
                the first of them is kept.
        """
        batch, heads, tokens, _ = key.shape
        if batch % copies:
            raise ValueError(f"the batch must hold {copies} copies of each prompt, but has {batch} rows")
        key, value = key.detach()[::copies], value.detach()[::copies]
        kept = None if valid is None else valid[::copies]
        if kept is None or bool(kept.all()):
            counts, padded = [tokens] * len(key), [0] * len(key)
            key, value = (tensor.reshape(-1, tensor.shape[-1]) for tensor in (key, value))
        else:
            counts = kept.sum(-1).tolist()
            padded = [tokens - 1 - int(row.nonzero().max()) if row.any() else tokens for row in kept]
            key, value = (
                torch.cat(
                    [row[:, mask].flatten(0, 1) for row, mask in zip(tensor, kept.to(tensor.device), strict=True)]
                )
                for tensor in (key, value)
            )
        return cls(
            codec,
            store,
            store.put(codec.encode(key, value)),
            tuple((count,) * heads for count in counts),
            tuple(row // copies for row in range(batch)),
            tokens,
            tuple(padded),
            key.device,
        )

    def attend(self, query: Tensor, scale: float, softcap: float) -> tuple[Tensor, Tensor]:
        """Partial attention of query `[B, H_kv, M, D]`, the group folded into M, over all kept tokens.

        Returns:
            out `[B, H_kv, M, D]` and lse `[B, H_kv, M]`; a row without tokens has out 0 and lse -inf.
        """
        payload = self.store.get(self.held, self.device)
        copies = self._regular_copies()
        if copies == 1:
            return self.codec.attend(payload, 0, self._shape(), query, scale, softcap)
        if copies:
            # the rows of one prompt read its keys once: they become further rows of the query
            batch, heads, length, dim = query.shape
            folded = query.view(batch // copies, copies, heads, length, dim).transpose(1, 2).flatten(2, 3)
            out, lse = self.codec.attend(payload, 0, self._shape(), folded, scale, softcap)
            out = out.view(-1, heads, copies, length, dim).transpose(1, 2).reshape(batch, heads, length, dim)
            return out, lse.view(-1, heads, copies, length).transpose(1, 2).reshape(batch, heads, length)
        out, lse = torch.zeros_like(query), query.new_full(query.shape[:-1], -torch.inf, dtype=torch.float32)
        for start, (stored, heads, tokens) in self._blocks():
            readers = [row for row, source in enumerate(self.rows) if source == stored]
            if not readers or not tokens:
                continue
            part = query[readers, heads].transpose(0, 1).flatten(1, 2).unsqueeze(0)
            shape = (1, part.shape[1], tokens)
            part_out, part_lse = self.codec.attend(payload, start, shape, part, scale, softcap)
            unfolded = (part.shape[1], len(readers), -1)
            out[readers, heads] = part_out[0].view(*unfolded, query.shape[-1]).transpose(0, 1)
            lse[readers, heads] = part_lse[0].view(unfolded).transpose(0, 1).to(lse.dtype)
        return out, lse

    def select_rows(self, rows: list[int]) -> Segment:
        """The segment whose batch row i is this one's row `rows[i]`; no entry is moved or copied."""
        return replace(self, rows=tuple(self.rows[row] for row in rows))

    def crop(self, tokens: int) -> Segment | None:
        """The segment without its last `tokens` tokens, None when nothing is left. Its entries are encoded anew."""
        if tokens >= self.seen:
            return None
        payload = self.store.get(self.held, self.device)
        key, value = self.codec.decode(payload)
        parts, start = [], 0
        lengths = []
        for row, at_end in zip(self.lengths, self.padded, strict=True):
            lengths.append(tuple(max(count - max(tokens - at_end, 0), 0) for count in row))
            for count, rest in zip(row, lengths[-1], strict=True):
                parts.append((start, rest))
                start += count
        index = torch.cat([torch.arange(start, start + rest, device=key.device) for start, rest in parts])
        held = self.store.put(self.codec.encode(key[index], value[index]))
        padded = tuple(max(at_end - tokens, 0) for at_end in self.padded)
        return replace(self, held=held, lengths=tuple(lengths), seen=self.seen - tokens, padded=padded)

    def dense(self) -> list[list[tuple[Tensor, Tensor]]]:
        """The kept keys and values, decoded: `[stored row][head] -> (key [T, D], value [T, D])`."""
        key, value = self.codec.decode(self.store.get(self.held, self.device))
        counts = [count for row in self.lengths for count in row]
        pairs = list(zip(key.split(counts), value.split(counts), strict=True))
        heads = len(self.lengths[0])
        return [pairs[first : first + heads] for first in range(0, len(pairs), heads)]

    def describe(self) -> dict[str, Any]:
        """All but the tensors, as JSON can hold it."""
        codec: Any = self.codec
        options = {option.name: getattr(codec, option.name) for option in fields(codec)}
        return {
            "codec": {"name": codec.name, "options": options},
            "lengths": self.lengths,
            "rows": self.rows,
            "seen": self.seen,
            "padded": self.padded,
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
        lengths = tuple(tuple(row) for row in described["lengths"])
        held = store.put({name: tensor.to(device) for name, tensor in payload.items()})
        rows, padded = tuple(described["rows"]), tuple(described["padded"])
        return cls(codec, store, held, lengths, rows, described["seen"], padded, device)

    def __deepcopy__(self, memo) -> Segment:
        return self

    def _shape(self) -> tuple[int, int, int]:
        return len(self.lengths), len(self.lengths[0]), self.lengths[0][0]

    def _regular_copies(self) -> int:
        """How many consecutive batch rows read each stored row when all heads are equally long; 0 if irregular."""
        if self.lengths[0][0] == 0 or len({count for row in self.lengths for count in row}) > 1:
            return 0
        copies = len(self.rows) // len(self.lengths)
        return copies if self.rows == tuple(row // max(copies, 1) for row in range(len(self.rows))) else 0

    def _blocks(self) -> Iterator[tuple[int, tuple[int, slice, int]]]:
        """The largest blocks of equally long heads of one row, as (first entry, (stored row, heads, tokens))."""
        start = 0
        for stored, counts in enumerate(self.lengths):
            if len(set(counts)) == 1:
                yield start, (stored, slice(None), counts[0])
            else:
                offsets = [start + sum(counts[:head]) for head in range(len(counts))]
                for head, count in enumerate(counts):
                    yield offsets[head], (stored, slice(head, head + 1), count)
            start += sum(counts)
