"""`PromptSession`: what one cache takes from a store, and gives to it, while a prompt is read.

A prompt comes in one forward or in several. Before each, the session looks up what the store has of its tokens; the
layers adopt those keys and values as if an earlier forward had brought them, and the model runs on the rest. Layers
hand the session what they compute. When the prompt is complete, its pages that the store does not have are written in
the background.

Pages hold the dense keys and values of the prompt as its attention saw them, before eviction and before codes, and the
spec's other methods are applied after adoption. So a hit ends in the cache that a cold run ends in, whatever is
composed, and one store serves all compositions of one sharing plan.

Rows of a batch are looked up one by one. They share their columns, so a batch adopts up to the column that every row
can: rows that miss make it a cold run. Padding stands for nothing and is neither looked up nor stored.

Where two prompts part in the middle of a page, the second one's page is written with what it adopted of the first's.
A codec that loses would lose again with every such fork, so of a page that it does not keep as it is nothing is adopted
but the whole.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from hf_kvcache.clock import now
from hf_kvcache.sequential.identity import Identity
from hf_kvcache.sequential.lookup import Match
from hf_kvcache.sequential.page import Context, Geometry, Page, PageCodec, Rotate
from hf_kvcache.sequential.pieces import Pieces
from hf_kvcache.sequential.store import PrefixStore

# a tail is worth a file of its own from this part of a page on
SHORTEST_TAIL = 16


class AdoptingLayer(Protocol):
    """A cache layer that can take keys and values `[B, H_kv, n, D]` of the next tokens without attention."""

    seen: int

    def adopt(self, key: Tensor, value: Tensor) -> None: ...


@dataclass(frozen=True)
class ModelFacts:
    """What a session asks of the model before a forward.

    Args:
        weights: digest of all weights and settings in force.
        geometry: of one token's keys and values.
        devices: of the producers.
        rotate: applies and undoes RoPE.
    """

    weights: str
    geometry: Geometry
    devices: Sequence[torch.device]
    rotate: Rotate


@dataclass
class Row:
    """One row of the batch.

    Args:
        ids: token ids so far, without padding.
        padding: columns before them.
        matches: pages that the store has of the prompt.
        pages: those that were read, by their start.
    """

    ids: np.ndarray
    padding: int
    matches: list[Match] = field(default_factory=list)
    pages: dict[int, Page] = field(default_factory=dict)


class PromptSession:
    """One prompt of one cache.

    Args:
        store: where pages are.
        codec: of the pages.
        identity: makes the identity from a digest of the weights and a dtype.
        prompt_length: columns of the prompt, padding included.
        queries: how many of the last queries of the prompt eviction wants to see; None for all of them.
    """

    def __init__(
        self,
        store: PrefixStore,
        codec: PageCodec,
        identity: Callable[[str, str], Identity],
        prompt_length: int,
        queries: int | None,
    ) -> None:
        self.store, self.codec, self._identity = store, codec, identity
        self.prompt_length, self.queries = prompt_length, queries
        self.rows: list[Row] = []
        self.adopted = 0
        self.facts: ModelFacts | None = None
        self.active = True
        self._seen = 0
        self._began = 0.0
        self._devices: set[torch.device] = set()
        self._pieces = Pieces()
        # by producer, the column up to which it has keys and values
        self._filled: dict[int, int] = {}
        # the first column of a page to write: nothing before it is kept
        self._kept_from = 0

    def ends_with(self, columns: int) -> bool:
        """Whether a forward of so many columns brings the rest of the prompt."""
        return self._seen + columns >= self.prompt_length

    def before(self, ids: Tensor, mask: Tensor | None, facts: ModelFacts, layers: Sequence[AdoptingLayer]) -> int:
        """Looks up the tokens of a forward and has the layers adopt what is there.

        Args:
            ids: token ids `[B, L]` of the forward.
            mask: `[B, seen + L]`, 0 for padding on the left; None when there is none.
            facts: of the model.
            layers: the producers.

        Returns:
            how many of the L columns need not be computed; less than L.
        """
        if not self.active:
            return 0
        changed = self.facts is not None and self.facts.weights != facts.weights
        moved = any(layer.seen != self._seen for layer in layers) or (self.rows and len(self.rows) != len(ids))
        if changed or moved:
            # the model or the cache was changed in the middle of a prompt
            self.stop()
            return 0
        self.facts = facts
        new = min(ids.shape[1], self.prompt_length - self._seen)
        self._take_ids(ids[:, :new].cpu().numpy(), mask)
        end = self._seen + new
        adopted = 0
        if self.active and new > 0:
            self._look_up()
            most = min(end, self._seen + ids.shape[1] - 1, self._adoptable)
            target = min([most, *(row.padding + self._known(row) for row in self.rows)])
            adopted = self._adopt(target, layers) if target > self._seen else 0
        self._seen += adopted
        self._began = now(self._devices)
        return adopted

    def take(self, producer: int, first: int, key: Tensor, value: Tensor) -> None:
        """What a layer computed: key and value `[B, H_kv, n, D]` of the columns from `first` on."""
        columns = min(key.shape[2], self.prompt_length - first)
        if self.active and self.facts is not None and columns > 0:
            geometry = self.facts.geometry
            place = geometry.producers.index(producer)
            expected = (geometry.heads[place], geometry.dims[place])
            shapes = {(tensor.shape[1], tensor.shape[3]) for tensor in (key, value)}
            if key.dtype != geometry.dtype or shapes != {expected}:
                self.stop()
                return
            self._filled[producer] = first + columns
            self._devices.add(key.device)
            self._keep(producer, first, key[:, :, :columns].detach(), value[:, :, :columns].detach())

    def after(self) -> None:
        """Ends a forward; when the prompt is complete, its pages are submitted."""
        if not self.active or self.facts is None:
            return
        seen = min(self._filled.values(), default=0)
        computed = (seen - self._seen) * len(self.rows)
        self.store.rates.note(self.identity.fingerprint, computed, now(self._devices) - self._began)
        self._seen = seen
        if seen >= self.prompt_length:
            self._submit()
            self.stop()

    def stop(self) -> None:
        """Takes no further part in this prompt, and lets go of everything."""
        self.active, self.facts = False, None
        self._pieces, self._filled, self.rows = Pieces(), {}, []

    def __deepcopy__(self, memo) -> PromptSession:
        # a copy of the cache goes on by itself: the prompt is stored once, by the original
        copied = copy.copy(self)
        copied.stop()
        return copied

    @property
    def identity(self) -> Identity:
        assert self.facts is not None
        return self._identity(self.facts.weights, str(self.facts.geometry.dtype))

    @property
    def _context(self) -> Context:
        assert self.facts is not None
        seconds = self.store.rates.seconds(self.identity.fingerprint)
        return Context(self.facts.geometry, self.facts.rotate, seconds, self.store.bandwidth)

    @property
    def _adoptable(self) -> int:
        """The columns that may be adopted: eviction must see its queries, and the last token is always computed."""
        return 0 if self.queries is None else self.prompt_length - max(self.queries, 1)

    def _take_ids(self, ids: np.ndarray, mask: Tensor | None) -> None:
        """Adds the ids of a forward to the rows; stops the session where padding is anywhere but on the left."""
        end = self._seen + ids.shape[1]
        valid = np.ones((len(ids), end), dtype=bool) if mask is None else mask[:, :end].bool().cpu().numpy()
        padding = end - valid.sum(1)
        if valid.shape[1] != end or any(valid[row, : padding[row]].any() for row in range(len(ids))):
            self.stop()
            return
        if not self.rows:
            self.rows = [Row(np.empty(0, np.uint32), 0) for _ in ids]
        for row, own, columns in zip(self.rows, ids, padding, strict=True):
            skip = max(int(columns) - self._seen, 0)
            row.ids = np.concatenate([row.ids, own[skip:].astype(np.uint32)])
            row.padding = int(columns)

    def _look_up(self) -> None:
        found: dict[bytes, list[Match]] = {}
        for row in self.rows:
            name = row.ids.tobytes()
            if name not in found:
                known = self._whole(row)
                found[name] = self.store.match(self.identity, row.ids, known=known, forked=self.codec.repeatable)
            row.matches = found[name]
        # what was let go of once does not come back, also where a store has lost pages since
        self._kept_from = max(self._kept_from, min(row.padding + self._stored(row) for row in self.rows))

    def _whole(self, row: Row) -> list[Match]:
        """The whole pages that the store has of a row."""
        return [match for match in row.matches if match.length == self.store.page_size]

    def _stored(self, row: Row) -> int:
        """Their tokens."""
        return len(self._whole(row)) * self.store.page_size

    def _keep(self, producer: int, first: int, key: Tensor, value: Tensor) -> None:
        """Notes keys and values `[B, H_kv, n, D]` of the columns from `first` on, where pages will be made of them."""
        skip = max(self._kept_from - first, 0)
        if skip >= key.shape[2]:
            return
        if skip:
            # a view would hold on to the columns before it
            key, value = key[:, :, skip:].clone(), value[:, :, skip:].clone()
        self._pieces.add(producer, first + skip, key, value)

    def _known(self, row: Row) -> int:
        return sum(match.length for match in row.matches)

    def _adopt(self, target: int, layers: Sequence[AdoptingLayer]) -> int:
        """Gives the layers the columns up to `target`, or fewer where a page cannot be read; returns how many."""
        assert self.facts is not None
        read: dict[str, Page | None] = {}
        for row in self.rows:
            for match in row.matches:
                if row.padding + match.start >= target:
                    break
                if row.padding + match.start + match.length <= self._seen:
                    continue
                if match.key not in read:
                    read[match.key] = self._read(match)
                page = read[match.key]
                if page is None or not _stands_for(page, match, row.ids):
                    target = min(target, max(row.padding + match.start, self._seen))
                    break
                row.pages[match.start] = page.first(match.length)
        if target <= self._seen:
            return 0
        for index, layer in enumerate(layers):
            geometry, device = self.facts.geometry, self.facts.devices[index]
            shape = (len(self.rows), geometry.heads[index], target - self._seen, geometry.dims[index])
            pair = [torch.zeros(shape, dtype=geometry.dtype) for _ in range(2)]
            for number, row in enumerate(self.rows):
                self._fill(pair, number, row, index, target)
            key, value = (tensor.to(device) for tensor in pair)
            layer.adopt(key, value)
            self._filled[geometry.producers[index]] = target
            self._keep(geometry.producers[index], self._seen, *pair)
        used = {match.key: match for row in self.rows for match in row.matches if match.key in read}
        tokens = sum(target - max(row.padding, self._seen) for row in self.rows if row.padding < target)
        self.store.adopted(list(used.values()), tokens)
        for row in self.rows:
            row.pages = {}
        count = target - self._seen
        self.adopted += count
        return count

    def _read(self, match: Match) -> Page | None:
        page = self.store.load(match, {self.codec.name: self.codec}, self._context)
        return page if page is not None and page.keys else None

    def _fill(self, pair: list[Tensor], number: int, row: Row, index: int, target: int) -> None:
        """Copies a row's pages of one layer to the columns from the present one to `target`."""
        for start, page in row.pages.items():
            first = max(row.padding + start, self._seen)
            last = min(row.padding + start + len(page), target)
            if first < last:
                inside = slice(first - row.padding - start, last - row.padding - start)
                columns = slice(first - self._seen, last - self._seen)
                pair[0][number, :, columns] = page.keys[index][:, inside]
                pair[1][number, :, columns] = page.values[index][:, inside]

    def _submit(self) -> None:
        """Hands the pages of every different row that the store lacks to its writer."""
        assert self.facts is not None
        size, chains = self.store.page_size, []
        for number, row in {row.ids.tobytes(): (number, row) for number, row in enumerate(self.rows)}.values():
            whole, start = self._whole(row), self._stored(row)
            if start >= len(row.ids) or row.padding + start < self._kept_from:
                continue
            # put together in the background, from what the forward left
            pages = [
                partial(self._pieces.page, self.facts.geometry, number, row.padding, row.ids[at : at + size], at)
                for at in range(start, len(row.ids), size)
            ]
            chains.append((whole[-1] if whole else None, pages))
        if chains:
            task = partial(_write, self.store, self.codec, self._context, self.identity, chains)
            # a prompt that waits is moved to the host: its keys and values are gigabytes of a device that the next
            # prompts need. One that does not wait is copied in the background, since copying it here would add to the
            # time to the first token
            self.store.submit(task, self._pieces.nbytes, ahead=self._pieces.to_host)


def _stands_for(page: Page, match: Match, ids: np.ndarray) -> bool:
    """Whether a page is of the tokens that it was found for: what found it, an index, is not signed as pages are."""
    own = ids[match.start : match.start + match.length]
    return page.start == match.start and np.array_equal(page.ids[: match.length], own)


def _write(
    store: PrefixStore,
    codec: PageCodec,
    context: Context,
    identity: Identity,
    chains: Sequence[tuple[Match | None, Sequence[Callable[[], Page]]]],
) -> None:
    """Stores pages that follow each other, each chain behind a page that is there, or at the beginning."""
    for behind, pages in chains:
        if behind is not None and not store.holds(behind):
            # it went since it was found, and nobody would find what comes after it
            continue
        parent = identity.root if behind is None else behind.key
        for make in pages:
            page = make()
            if len(page) * SHORTEST_TAIL < store.page_size:
                break
            seconds = context.prefill_seconds * len(page)
            key = store.put(page, parent, codec, context, seconds=seconds, model=identity.fingerprint)
            if key is None:
                break
            parent = key
