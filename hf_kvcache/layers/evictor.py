"""`Evictor`: one layer's part in eviction. It records queries and asks the policy what to keep."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from operator import attrgetter

import torch
from torch import Tensor, nn

from hf_kvcache.attention import AttentionCall
from hf_kvcache.eviction import Observation, Reading, Rotation
from hf_kvcache.layers.settings import LayerSettings
from hf_kvcache.segment import Segment

# and the number of a reading layer: names in a saved file
QUERIES = "queries."


class Evictor:
    """What eviction knows about one producer layer.

    Args:
        settings: of the layer; they hold a policy.

    Attributes:
        queries: by reading layer, the last queries `[B, H_q, W, D]` that the scorer looks at.
    """

    def __init__(self, settings: LayerSettings) -> None:
        assert settings.policy is not None
        self.settings, self.policy = settings, settings.policy
        self.queries: dict[int, Tensor] = {}
        # of the present forward only: a cache must not keep a model alive, nor be copied with it
        self._modules: dict[int, nn.Module] = {}
        self._rotations: dict[int, Rotation] = {}
        self._scale, self._softcap = 1.0, 0.0

    @property
    def every(self) -> int | None:
        """After how many generated tokens to evict again."""
        return self.policy.every

    @property
    def carried(self) -> tuple[str, ...]:
        """Names of the values that are kept with every token."""
        return self.policy.scorer.carried if self.every else ()

    def record(self, call: AttentionCall, take: int, copies: int) -> None:
        """Remembers the first `take` queries of a call, of one row in `copies`."""
        self._modules[call.layer] = attrgetter(self.settings.output)(call.module)
        self._scale, self._softcap = call.scale, call.softcap
        if self.policy.scorer.rotates and call.rotation is not None:
            self._rotations[call.layer] = call.rotation(call.module)
        wanted = self.policy.scorer.queries
        if wanted == 0 or take <= 0:
            return
        query = call.query[::copies, :, :take].detach()
        if call.layer in self.queries:
            query = torch.cat([self.queries[call.layer], query], dim=2)
        # where the last columns hold padding, a row's own last queries are further back
        padded = call.mask is not None and not bool(call.mask[:, 0, -1, -(wanted or 1) :].all())
        if wanted is not None and not padded and query.shape[2] > wanted:
            query = query[:, :, -wanted:].clone()
        self.queries[call.layer] = query

    def choose(
        self, key: Tensor, value: Tensor, valid: Tensor | None, copies: int
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Decides which tokens of a prompt to keep.

        Args:
            key, value: `[B, H_kv, T, D]`.
            valid: `[B, T]`, False for padding; None when there is none.
            copies: how many consecutive rows of the batch are copies of one prompt.

        Returns:
            A mask `[B, H_kv, T]`, None when all is kept, and values `[B, H_kv, T]` to carry along, by name.
        """
        if not self._modules:
            # the forward ended before this layer read anything: there is nothing to judge by
            return valid, {}
        key, value = key.detach()[::copies], value.detach()[::copies]
        observed = self._observation(key, value)
        valid = None if valid is None else valid[::copies].to(key.device)
        kept, carried = None, {name: key.new_zeros(key.shape[:-1], dtype=torch.float32) for name in self.carried}
        if valid is None or bool(valid.all()):
            decided = self.policy.keep(observed)
            if decided is not None:
                kept, carried = decided[0], {name: decided[1][name] for name in carried}
        else:
            kept = valid[:, None].repeat(1, key.shape[1], 1)
            for row in range(len(key)):
                columns = valid[row].nonzero()[:, 0]
                decided = None
                if len(columns):
                    alone = torch.tensor([row], device=key.device)
                    decided = self.policy.keep(_without_padding(observed, alone, columns))
                if decided is not None:
                    kept[row, :, columns] = decided[0][0]
                    for name, tensor in carried.items():
                        tensor[row, :, columns] = decided[1][name][0]
        self._forget_queries()
        # from here on every row of the batch is its own
        self.queries = {layer: query.repeat_interleave(copies, 0) for layer, query in self.queries.items()}
        kept = None if kept is None else kept.repeat_interleave(copies, 0)
        return kept, {name: tensor.repeat_interleave(copies, 0) for name, tensor in carried.items()}

    def observe(self, key: Tensor, value: Tensor, rows: list[int], columns: Tensor, copies: int) -> Observation:
        """Some rows of a prompt as if they had come without padding.

        Args:
            key, value: `[B, H_kv, T, D]`.
            rows: of the batch, each the first of its copies.
            columns: which of the T tokens are theirs.
            copies: how many consecutive rows of the batch are copies of one prompt.
        """
        whole = self._observation(key.detach()[::copies], value.detach()[::copies])
        if len(columns) == key.shape[2] and len(rows) == len(whole.key):
            return whole
        return _without_padding(whole, torch.tensor([row // copies for row in rows], device=key.device), columns)

    def is_due(self, settled: int, unsettled: int) -> bool:
        """Whether to evict from `settled` tokens of the tail, and queries are left without those of the last ones."""
        if self.every is None or settled < self.every:
            return False
        return self.policy.scorer.queries == 0 or all(query.shape[2] > unsettled for query in self.queries.values())

    def evict(self, segments: Sequence[Segment], there: Tensor | None, unsettled: int) -> Segment:
        """One segment of what is worth keeping of several.

        Args:
            segments: in the order of the sequence, the last one sealed just now.
            there: `[B, T]`, False for padding, of all columns that the segments cover; None when there is none.
            unsettled: how many tokens came after the last segment; their queries may be cropped and do not count.
        """
        whole = Segment.join([segment.expanded() for segment in segments])
        key, value, index, valid = whole.padded()
        observed = replace(
            self._observation(key, value, unsettled),
            valid=None if bool(valid.all()) else valid,
            carried={name: whole.held[name].to(key.device)[index] for name in self.carried},
        )
        columns, end = whole.positions().to(key.device)[index], whole.start + whole.seen
        kept = valid.clone()
        held = dict(whole.payload())
        for rows, own in _alike(there, len(key), end, key.device):
            # padding has no place in a row, wherever it lies, and what stood there asked nothing
            places = own.cumsum(-1) - 1
            decided = self.policy.keep(
                replace(
                    _asked_at(_rows(observed, rows), own.nonzero()[:, 0], end),
                    tokens=int(own.sum()),
                    positions=places[columns[rows]],
                )
            )
            if decided is not None:
                kept[rows] = decided[0]
                for name in self.carried:
                    held[name][index[rows][valid[rows]]] = decided[1][name][valid[rows]]
        self._forget_queries(unsettled)
        keep = torch.zeros(whole.layout.entries, dtype=torch.bool, device=key.device)
        keep[index[valid]] = kept[valid]
        return Segment.join([replace(whole, held=whole.store.put(held))], keep)

    def crop(self, tokens: int) -> None:
        """Forgets the last `tokens` queries."""
        if tokens:
            self.queries = {layer: query[:, :, :-tokens] for layer, query in self.queries.items()}

    def select_rows(self, rows: list[int]) -> None:
        """Makes batch row i what row `rows[i]` is now."""
        self.queries = {layer: query[rows] for layer, query in self.queries.items()}

    def describe(self) -> dict[str, Tensor]:
        """What a saved file needs, by name."""
        return {f"{QUERIES}{layer}": query for layer, query in self.queries.items()}

    def restore(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        """The inverse of `describe`; there may be other names."""
        mine = {name.removeprefix(QUERIES): t.to(device) for name, t in tensors.items() if name.startswith(QUERIES)}
        self.queries = {int(layer): query for layer, query in mine.items()}

    def forget_modules(self) -> None:
        """Ends a forward: lets go of the model."""
        self._modules, self._rotations = {}, {}

    def __deepcopy__(self, memo) -> Evictor:
        copied = Evictor(self.settings)
        copied.queries = {layer: query.clone() for layer, query in self.queries.items()}
        copied._scale, copied._softcap = self._scale, self._softcap
        return copied

    def _observation(self, key: Tensor, value: Tensor, unsettled: int = 0) -> Observation:
        queries = {layer: query[:, :, : query.shape[2] - unsettled] for layer, query in self.queries.items()}
        readings = [
            Reading(queries.get(layer), module, self._rotations.get(layer)) for layer, module in self._modules.items()
        ]
        place, readers = self.settings.place, self.settings.readers
        return Observation(key, value, readings, self._scale, self._softcap, place, len(readers), readers)

    def _forget_queries(self, unsettled: int = 0) -> None:
        """Lets go of queries that the next eviction does not look at; the last `unsettled` ones were not judged by."""
        if not self.every:
            self.queries = {}
        elif self.policy.scorer.queries is None:
            last = {layer: query[:, :, query.shape[2] - unsettled :] for layer, query in self.queries.items()}
            self.queries = {layer: query.clone() for layer, query in last.items()} if unsettled else {}


def _rows(observed: Observation, rows: Tensor) -> Observation:
    """The observation of some rows."""
    readings = [
        replace(reading, query=None if reading.query is None else reading.query[rows]) for reading in observed.readings
    ]
    return replace(
        observed,
        key=observed.key[rows],
        value=observed.value[rows],
        readings=readings,
        valid=None if observed.valid is None else observed.valid[rows],
        carried=None if observed.carried is None else {name: t[rows] for name, t in observed.carried.items()},
    )


def _without_padding(observed: Observation, rows: Tensor, columns: Tensor) -> Observation:
    """The observation of `rows` as if they had come alone: only their `columns`, and the queries that stand there."""
    own = _asked_at(_rows(observed, rows), columns, observed.num_tokens)
    return replace(own, key=own.key[:, :, columns], value=own.value[:, :, columns])


def _asked_at(observed: Observation, columns: Tensor, end: int) -> Observation:
    """The observation with only the queries that stand in `columns`; the last one recorded stands before `end`."""
    readings = []
    for reading in observed.readings:
        query = reading.query
        if query is not None:
            first = end - query.shape[2]
            query = query[:, :, columns[columns >= first] - first]
        readings.append(replace(reading, query=query))
    return replace(observed, readings=readings)


def _alike(there: Tensor | None, rows: int, end: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """The rows of a batch that have their padding in the same columns, and where their tokens are, `[end]`."""
    if there is None:
        there = torch.ones(1, end, dtype=torch.bool, device=device).expand(rows, -1)
    patterns, pattern = there.to(device).unique(dim=0, return_inverse=True)
    for index, own in enumerate(patterns):
        yield (pattern == index).nonzero()[:, 0], own
