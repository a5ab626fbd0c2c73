"""`KVCacheLayer`: a producer with full attention, whose prompt is sealed and may be evicted from."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hf_kvcache.attention import AttentionCall
from hf_kvcache.autocast import without_autocast
from hf_kvcache.eviction import Observation
from hf_kvcache.layers.common import OwnLayer, Witness, entry_of, refuse_backward, removed_by
from hf_kvcache.layers.drafts import refuse_drafts
from hf_kvcache.layers.evictor import Evictor
from hf_kvcache.layers.fixed import FixedTail
from hf_kvcache.layers.parts import attend_parts
from hf_kvcache.layers.replay import Replay
from hf_kvcache.layers.settings import LayerSettings
from hf_kvcache.segment import Segment
from hf_kvcache.tail import Tail


class KVCacheLayer(OwnLayer):
    """The KV of one producer with full attention: sealed segments, then a dense tail.

    The prompt is attended densely by the model's own attention, so prefill is exact. When the last layer that reads it
    has done so, eviction chooses what to keep and that is sealed. Later tokens go to the tail, which can be cropped;
    blocks of it are sealed in turn where the codec or the eviction policy asks for it.

    Args:
        settings: what it is made of.
    """

    is_sliding = False

    def __init__(self, settings: LayerSettings) -> None:
        super().__init__()
        self.settings = settings
        # what eviction dropped while decoding does not come back
        self.is_croppable = settings.policy is None or not settings.policy.every
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        self.segments: list[Segment] = []
        self.tail = Tail()
        self.seen = 0
        self.prompt_length: int | None = None
        self.copies = 1
        self.entry: tuple[int, int, int] | None = None
        self.evictor = None if self.settings.policy is None else Evictor(self.settings)
        self._fresh: tuple[Tensor, Tensor] | None = None
        self._fresh_mask: Tensor | None = None
        self._early: tuple[Tensor, Tensor] | None = None
        self._replay: Replay | None = None
        self._observation: Observation | None = None
        self._replaying = False
        self.record_past = False
        self.is_initialized = False
        self.witness: Witness | None = None
        self.fixed: FixedTail | None = None

    def expect(self, prompt_length: int, copies: int) -> None:
        """Announces the prompt: its length in tokens, and how many rows of the batch are copies of each prompt."""
        self.prompt_length, self.copies = prompt_length, copies

    def activate_past_recording(self) -> None:
        """Announces that a `crop` follows every forward (assisted decoding)."""
        refuse_drafts(self.settings, bool(self.segments))
        self.record_past = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        """Takes key and value `[B, H_kv, L, D]` of the new tokens and returns this layer in their place, twice."""
        if self._replaying and self._replay is not None:
            self._replay.take(key_states, value_states)
            return self, self
        if self.fixed is not None:
            self.fixed.take(key_states, value_states)
            return self, self
        self._settle()
        self.is_initialized = True
        self.entry = entry_of(key_states)
        if self.witness is not None:
            self.witness(self.seen, key_states, value_states)
        early = self._too_early(key_states.shape[2])
        if early:
            self._early = key_states[:, :, -early:], value_states[:, :, -early:]
            key_states, value_states = key_states[:, :, :-early], value_states[:, :, :-early]
        new = key_states.shape[2]
        if self.seen == 0 and new >= (self.prompt_length or 1):
            self._fresh = key_states, value_states
        else:
            self._append(key_states, value_states)
        self.seen += new
        return self, self

    def adopt(self, key: Tensor, value: Tensor) -> None:
        """Takes key and value `[B, H_kv, n, D]` of the next tokens of the prompt as an earlier forward left them."""
        self.is_initialized, self.entry = True, entry_of(key)
        self._append(key, value)
        self.seen += key.shape[2]

    def _append(self, key: Tensor, value: Tensor) -> None:
        """Adds a part of the prompt, or what comes after it, to the tail."""
        if self.prompt_length and self.seen == 0:
            self.tail.reserve(self.prompt_length)
        self.tail.append(key.detach(), value.detach())

    def attend(self, call: AttentionCall) -> Tensor:
        """Attention of the call's query over everything held; returns `[B, L, H_q, D]`."""
        if self._replaying and self._replay is not None:
            return self._replay.attend(call)
        if self.fixed is not None:
            return self.fixed.attend(call, self.segments)
        if self._early is not None:
            return self._attend_apart(call, *self._early)
        if self._fresh is not None:
            call = call.to(self._fresh[0].device)
            self._fresh_mask = call.mask
            out = call.dense(*self._fresh)
        else:
            call = call.to(self.tail.key.device)
            if self.segments or call.length == 1:
                out = self._attend_parts(call)
            else:
                out = refuse_backward(call.dense(self.tail.key, self.tail.value))
        if self.evictor is not None:
            self._record(self.evictor, call)
        if call.layer == self.settings.last_reader:
            self._finish_forward(call.mask, call.length)
        return out

    @property
    def room(self) -> int:
        """How many tokens can come one by one and change nothing but the tail, which has its memory already."""
        own = all(segment.rows == tuple(range(segment.layout.rows)) for segment in self.segments)
        if not self.segments or not own or self.prompt_length or self.record_past or not self.tail.capacity:
            return 0
        codec = self.settings.codec
        if not codec.block:
            return sys.maxsize
        return max(codec.residual_length + codec.block - 1 - self.tail.length, 0)

    def advance(self) -> None:
        """Counts a token that `fixed` took."""
        self.tail.advance()
        self.seen += 1

    def _too_early(self, new: int) -> int:
        """How many of the new tokens are drafts behind a prompt that is sealed in the same forward.

        They must see of the prompt what will be left of it, as they would had they come one by one. Layers that share
        cannot wait for it: the prompt is sealed when the last of them has read it.
        """
        settings = self.settings
        waits = settings.changes and not settings.deferred and not settings.shared
        if not waits or self.segments or not self.prompt_length:
            return 0
        early = self.seen + new - self.prompt_length
        return early if 0 < early < new else 0

    def _attend_apart(self, call: AttentionCall, key: Tensor, value: Tensor) -> Tensor:
        """Attention of a prompt, then of the drafts behind it, whose key and value these are."""
        own, self._early = call.length - key.shape[2], None
        prompt = self.attend(call.part(0, own, self.seen))
        self.tail.append(key.detach(), value.detach())
        self.seen += key.shape[2]
        drafts = self._attend_parts(call.part(own, call.length, self.seen).to(self.tail.key.device))
        return torch.cat([prompt, drafts.to(prompt.device)], dim=1)

    def _attend_parts(self, call: AttentionCall) -> Tensor:
        return attend_parts(call, self.tail, self.segments)

    def _record(self, evictor: Evictor, call: AttentionCall) -> None:
        """Lets eviction see the queries, of the prompt and, when it goes on while decoding, those after it."""
        first = self.seen - call.length
        if not self.segments:
            evictor.record(call, min(call.length, (self.prompt_length or self.seen) - first), self.copies)
        elif evictor.every:
            evictor.record(call, call.length, 1)

    def _finish_forward(self, mask: Tensor | None, new: int) -> None:
        """Seals what is complete: the prompt, then blocks of the tail."""
        if self._fresh is not None:
            self.prompt_length = self.prompt_length or self.seen
            key, value = (tensor.detach() for tensor in self._fresh)
            if self.settings.deferred:
                # read many times more before it is sealed
                key, value = key.contiguous(), value.contiguous()
            self.tail.adopt(key, value)
            self._fresh = self._fresh_mask = None
        if not self.segments and self.prompt_length and self.seen >= self.prompt_length:
            if self.settings.deferred:
                # the modules are still needed when all layers decide together
                return
            # the last query sees every token but padding
            keep = None if mask is None else mask[:, 0, -1, : self.prompt]
            lengths = [self.prompt] if keep is None else keep.sum(-1).tolist()
            carried: dict[str, Tensor] = {}
            if self.evictor is not None:
                key, value = self.tail.key[:, :, : self.prompt], self.tail.value[:, :, : self.prompt]
                keep, carried = self.evictor.choose(key, value, keep, self.copies)
            self._seal_prompt(keep, lengths, carried)
        elif self.segments:
            self._seal_tail(mask, new if self.record_past else 0)
        if self.evictor is not None:
            self.evictor.forget_modules()

    @property
    def prompt(self) -> int:
        """Tokens of the prompt that is not sealed yet."""
        return self.prompt_length or self.seen

    @property
    def pending(self) -> bool:
        """Whether the prompt is complete and waits, dense, for a decision over all layers."""
        return self.settings.deferred and not self.segments and bool(self.prompt_length) and self.seen >= self.prompt

    def observe_pending(self, rows: list[int], columns: Tensor, replays: bool) -> None:
        """Takes some rows of the pending prompt, without padding, for a decision; `replays`: to be read again first."""
        assert self.evictor is not None
        key, value = self.tail.key[:, :, : self.prompt], self.tail.value[:, :, : self.prompt]
        observation = self.evictor.observe(key, value, rows, columns.to(key.device), self.copies)
        self._replay = Replay(observation) if replays else None
        self._observation = observation

    def begin_replay(self, start: int, end: int) -> None:
        """From here on tokens repeat columns `start` to `end` of the observed prompt, and are forgotten."""
        if self._replay is not None:
            self._replay.begin(start, end)
            self._replaying = True

    def end_replay(self) -> None:
        self._replaying = False

    def observation(self) -> Observation:
        """What was observed of the pending prompt."""
        assert self._observation is not None
        replayed = None if self._replay is None else self._replay.score
        return replace(self._observation, replayed=replayed)

    def forget_observation(self) -> None:
        self._observation = self._replay = None

    def seal_pending(self, keep: Tensor, lengths: Sequence[int]) -> None:
        """Seals the pending prompt but for what `keep` `[S, H_kv, T]` says to drop, one row for each prompt."""
        self._seal_prompt(None if bool(keep.all()) else keep.repeat_interleave(self.copies, 0), lengths, {})
        if self.evictor is not None:
            self.evictor.forget_modules()

    def _seal_prompt(self, keep: Tensor | None, lengths: Sequence[int], carried: Mapping[str, Tensor]) -> None:
        """Seals the prompt, which lies in the tail. What came after it stays there, and so do its last tokens if the
        codec wants them dense.

        Args:
            keep: `[B, H_kv, T]` or, for padding alone, `[B, T]`; None to keep all.
            lengths: tokens of every prompt, without padding.
            carried: `[B, H_kv, T]` by name.
        """
        settings = self.settings
        sealed = max(self.prompt - settings.residual(lengths), min(self.prompt, 1))
        if keep is not None:
            keep = (keep if keep.dim() == 3 else keep.unsqueeze(1))[..., :sealed]
        carried = {name: tensor[..., :sealed] for name, tensor in carried.items()}
        key, value = self.tail.key[:, :, :sealed], self.tail.value[:, :, :sealed]
        segment = Segment.seal(settings.codec, settings.store, key, value, keep, self.copies, carried=carried)
        self.segments, self.tail = [segment], self.tail.without_first(sealed)
        self.prompt_length, self.copies = None, 1

    def _seal_tail(self, mask: Tensor | None, unsettled: int) -> None:
        """While decoding: evicts again when it is time, or seals full blocks of the tail as the codec asks.

        Args:
            mask: of the forward.
            unsettled: how many of the last tokens may yet be cropped, and stay.
        """
        settings, tail = self.settings, self.tail
        settled = tail.length - unsettled
        judge = self.evictor if self.evictor is not None and self.evictor.every else None
        if judge is not None:
            if not judge.is_due(settled, unsettled):
                return
            sealed = settled
        else:
            block = settings.codec.block
            if not block or settled < settings.codec.residual_length + block:
                return
            sealed = (settled - settings.codec.residual_length) // block * block
        start = self.seen - tail.length
        key, value = tail.key[:, :, :sealed], tail.value[:, :, :sealed]
        keep = None if mask is None else mask[:, :, -1, start : start + sealed]
        carried: dict[str, Tensor] = {}
        if judge is not None:
            carried = {name: key.new_zeros(key.shape[:-1], dtype=torch.float32) for name in judge.carried}
            self.segments = [segment.expanded() for segment in self.segments]
        elif len(self.segments) > 1:
            # beams have diverged behind the prompt, which stays shared: rows that none of them reads any more go, and
            # what is sealed now can be joined
            self.segments[-1] = self.segments[-1].expanded()
        last = self.segments[-1]
        like = last if last.continues(settings.codec, len(key)) else None
        new = Segment.seal(settings.codec, settings.store, key, value, keep, start=start, carried=carried, like=like)
        if judge is not None:
            there = None if mask is None else mask[:, 0, -1, : start + sealed]
            self.segments = [judge.evict([*self.segments, new], there, unsettled)]
        elif like is not None:
            self.segments[-1] = Segment.join([like, new])
        else:
            self.segments.append(new)
        self.tail = tail.without_first(sealed)

    def _settle(self) -> None:
        """Seals a prompt whose forward ended before its last reader: an early exit, or an error on the way."""
        if self._fresh is not None:
            with without_autocast(self._fresh[0].device):
                self._finish_forward(self._fresh_mask, 0)

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last tokens: `-tokens_to_remove` of them, or all but `tokens_to_remove` when that is positive."""
        self._settle()
        remove = removed_by(tokens_to_remove, self.seen)
        self.seen -= remove
        if self.evictor is not None:
            self.evictor.crop(remove)
        from_tail = min(remove, self.tail.length)
        self.tail.crop(from_tail)
        remove -= from_tail
        while remove:
            segment = self.segments.pop()
            rest = segment.crop(remove)
            remove -= segment.seen - (rest.seen if rest else 0)
            self.segments += [rest] if rest else []

    def select_rows(self, rows: list[int]) -> None:
        """Makes batch row i what row `rows[i]` is now (beam search, repetition, selection)."""
        self.segments = [segment.select_rows(rows) for segment in self.segments]
        self.tail.select_rows(rows)
        if self.evictor is not None:
            self.evictor.select_rows(rows)

    def tensors(self) -> list[Tensor]:
        """Every tensor that this layer keeps alive."""
        sealed = [tensor for segment in self.segments for tensor in segment.tensors()]
        queries = {} if self.evictor is None else self.evictor.describe()
        return [*sealed, *self.tail.tensors(), *(self._fresh or ()), *queries.values()]

    def describe(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What a saved file needs: a JSON-able description and the tensors by name."""
        self._settle()
        described = {
            "seen": self.seen,
            "segments": [segment.describe() for segment in self.segments],
            "entry": self.entry,
            "prompt_length": self.prompt_length,
            "copies": self.copies,
            "carried": [] if self.evictor is None else self.evictor.carried,
        }
        tensors = {
            f"segments.{index}.{name}": tensor
            for index, segment in enumerate(self.segments)
            for name, tensor in segment.held.items()
        }
        if self.tail.length:
            tensors |= {"tail.key": self.tail.key, "tail.value": self.tail.value}
        if self.evictor is not None:
            tensors |= self.evictor.describe()
        return described, tensors

    def restore(self, described: dict[str, Any], tensors: dict[str, Tensor], device: torch.device) -> None:
        """The inverse of `describe`."""
        self.reset()
        own, every = self.settings.codec, self.evictor is not None and self.evictor.every
        wanted = () if self.evictor is None else self.evictor.carried
        # what another method carried along is of no use to this one
        foreign = set(described.get("carried", ())).difference(wanted)
        for index, segment in enumerate(described["segments"]):
            prefix = f"segments.{index}."
            held = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
            payload = {name: tensor for name, tensor in held.items() if name not in foreign}
            if missing := set(wanted).difference(payload):
                raise ValueError(
                    f"the cache was saved without {', '.join(sorted(missing))} of its tokens, by which this model's "
                    "eviction chooses while it decodes; patch it with the method that made it"
                )
            self.segments.append(Segment.restore(segment, payload, own, self.settings.store, device))
            if every and self.segments[-1].codec != own:
                raise ValueError(
                    f"the cache was saved with the codec {self.segments[-1].codec}, this model evicts while decoding "
                    f"and has {own}, and no eviction chooses between the two; patch it with the method that made it"
                )
        self.prompt_length, self.copies = described["prompt_length"], described["copies"]
        if "tail.key" in tensors:
            self.tail.append(tensors["tail.key"].to(device), tensors["tail.value"].to(device))
        if self.evictor is not None:
            self.evictor.restore(tensors, device)
        self.seen, self.entry = described["seen"], tuple(described["entry"]) if described["entry"] else None
        self.is_initialized = self.seen > 0
