"""The layers of a `KVCache`: producers that hold KV, sliding producers, and consumers that hold nothing.

A layer stands in the place of key and value: `update` returns the layer itself, and the attention function calls its
`attend`. `seen` counts the tokens processed and drives positions and masks; what is held is private to the layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from hf_kvcache.attention import AttentionCall
from hf_kvcache.codecs import Codec
from hf_kvcache.kernels.decode_attention import decode_attention
from hf_kvcache.kernels.merge_states import merge_states
from hf_kvcache.segment import Segment
from hf_kvcache.stores import Store
from hf_kvcache.tail import Tail


class KVCacheLayer(CacheLayerMixin):
    """The KV of one producer with full attention: sealed segments, then a dense tail.

    The prompt is attended densely by the model's own attention, so prefill is exact, and sealed when the last layer
    that reads it has done so. Later tokens go to the tail, which can be cropped.

    Args:
        codec: how sealed entries are stored.
        store: where they are stored.
        last_reader: the last layer that reads this layer's KV, itself included.
    """

    is_sliding = False
    is_croppable = True
    is_compileable = False
    supports_early_init = False

    def __init__(self, codec: Codec, store: Store, last_reader: int) -> None:
        super().__init__()
        self.codec, self.store, self.last_reader = codec, store, last_reader
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        self.segments: list[Segment] = []
        self.tail = Tail()
        self.seen = 0
        self.prompt_length: int | None = None
        self.copies = 1
        self.entry: tuple[int, int, int] | None = None
        self._fresh: tuple[Tensor, Tensor] | None = None
        self._fresh_mask: Tensor | None = None
        self.is_initialized = False

    def expect(self, prompt_length: int, copies: int) -> None:
        """Announces the prompt: its length in tokens, and how many rows of the batch are copies of each prompt."""
        self.prompt_length, self.copies = prompt_length, copies

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        """Takes key and value `[B, H_kv, L, D]` of the new tokens and returns this layer in their place, twice."""
        self._settle()
        self.is_initialized = True
        self.entry = entry_of(key_states)
        new = key_states.shape[2]
        if self.seen == 0 and new >= (self.prompt_length or 1):
            self._fresh = key_states, value_states
        else:
            if self.prompt_length and self.seen == 0:
                self.tail.reserve(self.prompt_length)
            self.tail.append(key_states.detach(), value_states.detach())
        self.seen += new
        return self, self

    def attend(self, call: AttentionCall) -> Tensor:
        """Attention of the call's query over everything held; returns `[B, L, H_q, D]`."""
        if self._fresh is not None:
            call = call.to(self._fresh[0].device)
            self._fresh_mask = call.mask
            out = call.dense(*self._fresh)
        else:
            call = call.to(self.tail.key.device)
            if self.segments or call.length == 1:
                out = self._attend_parts(call)
            else:
                out = call.dense(self.tail.key, self.tail.value)
        if call.layer == self.last_reader:
            self._finish_forward(call.mask)
        return out

    def _attend_parts(self, call: AttentionCall) -> Tensor:
        key, value = self.tail.key, self.tail.value
        query = call.folded_query(key.shape[1])
        group = query.shape[2] // call.length
        mask = call.folded_mask(group, self.tail.length)
        out, lse = decode_attention(query, key, value, mask, scale=call.scale, softcap=call.softcap)
        for segment in self.segments:
            out, lse = merge_states(*segment.attend(query, call.scale, call.softcap), out, lse)
        return call.unfolded(out)

    def _finish_forward(self, mask: Tensor | None) -> None:
        """Seals the prompt once it is complete; what came after it in the same forward goes to the tail."""
        if self._fresh is not None:
            key, value = self._fresh
            prompt = self.prompt_length or self.seen
        elif self.prompt_length and not self.segments and self.seen >= self.prompt_length:
            key, value, prompt = self.tail.key, self.tail.value, self.prompt_length
        else:
            return
        # the last query sees every token but padding
        valid = None if mask is None else mask[:, 0, -1, :prompt]
        self.segments = [
            Segment.seal(self.codec, self.store, key[:, :, :prompt], value[:, :, :prompt], valid, self.copies)
        ]
        self._fresh = self._fresh_mask = self.prompt_length = None
        self.copies, self.tail = 1, Tail()
        if prompt < self.seen:
            self.tail.append(key[:, :, prompt:].detach(), value[:, :, prompt:].detach())

    def _settle(self) -> None:
        """Seals a prompt whose forward ended before its last reader: an early exit, or an error on the way."""
        if self._fresh is not None:
            self._finish_forward(self._fresh_mask)

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last tokens: `-tokens_to_remove` of them, or all but `tokens_to_remove` when that is positive."""
        self._settle()
        remove = removed_by(tokens_to_remove, self.seen)
        self.seen -= remove
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

    def tensors(self) -> list[Tensor]:
        """Every tensor that this layer keeps alive."""
        sealed = [tensor for segment in self.segments for tensor in segment.held.values()]
        return sealed + self.tail.tensors() + list(self._fresh or ())

    def describe(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What a saved file needs: a JSON-able description and the tensors by name."""
        self._settle()
        described = {
            "seen": self.seen,
            "segments": [segment.describe() for segment in self.segments],
            "entry": self.entry,
            "prompt_length": self.prompt_length,
            "copies": self.copies,
        }
        tensors = {
            f"segments.{index}.{name}": tensor
            for index, segment in enumerate(self.segments)
            for name, tensor in segment.held.items()
        }
        if self.tail.length:
            tensors |= {"tail.key": self.tail.key, "tail.value": self.tail.value}
        return described, tensors

    def restore(self, described: dict[str, Any], tensors: dict[str, Tensor], device: torch.device) -> None:
        """The inverse of `describe`."""
        self.reset()
        for index, segment in enumerate(described["segments"]):
            prefix = f"segments.{index}."
            payload = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
            self.segments.append(Segment.restore(segment, payload, self.codec, self.store, device))
        self.prompt_length, self.copies = described["prompt_length"], described["copies"]
        if "tail.key" in tensors:
            self.tail.append(tensors["tail.key"].to(device), tensors["tail.value"].to(device))
        self.seen, self.entry = described["seen"], tuple(described["entry"]) if described["entry"] else None
        self.is_initialized = self.seen > 0

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to prepare: memory is taken when the first tokens come."""


class SlidingLayer(CacheLayerMixin):
    """The KV of one producer with sliding-window attention: the last `sliding_window - 1` tokens, dense.

    That is all that later tokens can see, so nothing more is kept, unless the caller announces with
    `activate_past_recording` that a `crop` follows every forward (assisted decoding): then older tokens stay until that
    crop. Consumers read the keys and values of the present forward, as the layer itself does.

    Args:
        sliding_window: tokens that a query sees, itself included.
        last_reader: the last layer that reads this layer's KV, itself included.
    """

    is_sliding = True
    is_croppable = True
    is_compileable = False
    supports_early_init = False

    keys: Tensor
    values: Tensor

    def __init__(self, sliding_window: int, last_reader: int) -> None:
        super().__init__()
        self.sliding_window, self.last_reader = sliding_window, last_reader
        self._recording = False
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        self.keys = self.values = torch.empty(0)
        self.is_initialized = False
        self.seen = 0
        self.entry: tuple[int, int, int] | None = None
        self._visible: tuple[Tensor, Tensor] | None = None

    def activate_past_recording(self) -> None:
        """Announces that a `crop` follows every forward."""
        self._recording = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        """Takes key and value `[B, H_kv, L, D]` of the new tokens and returns this layer in their place, twice."""
        self.entry = entry_of(key_states)
        new = key_states.shape[2]
        if self.is_initialized:
            key_states = torch.cat([self.keys, key_states], dim=2)
            value_states = torch.cat([self.values, value_states], dim=2)
        visible = self._reach() + new
        self._visible = last_tokens(key_states, visible), last_tokens(value_states, visible)
        self.seen += new
        self.keys, self.values = key_states, value_states
        self.is_initialized = True
        return self, self

    def attend(self, call: AttentionCall) -> Tensor:
        """Attention over the window; returns `[B, L, H_q, D]`."""
        assert self._visible is not None
        key, value = self._visible
        call = call.to(key.device)
        if call.length > 1:
            out = call.dense(key, value)
        else:
            query = call.folded_query(key.shape[1])
            mask = call.folded_mask(query.shape[2], key.shape[2])
            out = call.unfolded(decode_attention(query, key, value, mask, scale=call.scale, softcap=call.softcap)[0])
        if call.layer == self.last_reader:
            self._visible = None
            self._hold(self.keys.shape[2] if self._recording else self._reach())
        return out

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last `-tokens_to_remove` tokens, and what was recorded beyond the window."""
        remove = removed_by(tokens_to_remove, self.seen)
        if not self.is_initialized:
            return
        rest, needed = self.keys.shape[2] - remove, min(self.seen - remove, self.sliding_window - 1)
        if rest < needed:
            raise RuntimeError(
                f"cannot crop {remove} tokens: the {needed - rest} tokens that would come back into the window of "
                f"{self.sliding_window} are gone; call cache.activate_past_recording() before the forward"
            )
        self.seen -= remove
        self.keys, self.values = self.keys[:, :, :rest], self.values[:, :, :rest]
        self._hold(needed)

    def expect(self, prompt_length: int, copies: int) -> None:
        """Nothing to prepare."""

    def select_rows(self, rows: list[int]) -> None:
        """Makes batch row i what row `rows[i]` is now (beam search, repetition, selection)."""
        if self.is_initialized:
            self.keys, self.values = self.keys[rows], self.values[rows]

    def tensors(self) -> list[Tensor]:
        """Every tensor that this layer keeps alive."""
        return [self.keys, self.values, *(self._visible or ())] if self.is_initialized else []

    def describe(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What a saved file needs: a JSON-able description and the tensors by name."""
        tensors = {"keys": self.keys, "values": self.values} if self.is_initialized else {}
        return {"seen": self.seen, "entry": self.entry}, tensors

    def restore(self, described: dict[str, Any], tensors: dict[str, Tensor], device: torch.device) -> None:
        """The inverse of `describe`."""
        self.reset()
        if tensors:
            self.keys, self.values = tensors["keys"].to(device), tensors["values"].to(device)
            self.is_initialized = True
        self.seen, self.entry = described["seen"], tuple(described["entry"]) if described["entry"] else None

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._reach() + query_length, self.seen - self._reach()

    def get_max_length(self) -> int:
        return self.sliding_window

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to prepare: memory is taken when the first tokens come."""

    def _reach(self) -> int:
        """How many of the tokens seen the next one can see."""
        return min(self.seen, self.sliding_window - 1)

    def _hold(self, tokens: int) -> None:
        """Keeps the last tokens, in storages of their own: a view would keep the whole prompt alive."""
        self.keys, self.values = (
            tensor.detach().clone(memory_format=torch.contiguous_format)
            if tensor.nbytes < tensor.untyped_storage().nbytes()
            else tensor.detach()
            for tensor in (last_tokens(self.keys, tokens), last_tokens(self.values, tokens))
        )


class ConsumerLayer(CacheLayerMixin):
    """A layer that stores nothing and reads the KV of its producer."""

    is_croppable = True
    is_compileable = False
    supports_early_init = False

    def __init__(self, source: KVCacheLayer | SlidingLayer) -> None:
        super().__init__()
        self.source = source
        self.is_sliding = source.is_sliding
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        """Ignores what it is given and returns the producer, which has the new tokens already."""
        return self.source, self.source

    @property
    def seen(self) -> int:
        return self.source.seen

    def get_seq_length(self) -> int:
        return self.source.get_seq_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.source.get_mask_sizes(query_length)

    def get_max_length(self) -> int:
        return self.source.get_max_length()

    def tensors(self) -> list[Tensor]:
        return []

    def describe(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return {}, {}

    def _nothing(self, *args, **kwargs) -> None:
        """The producer does it."""

    expect = crop = select_rows = reset = restore = offload = prefetch = lazy_initialization = _nothing


def last_tokens(tensor: Tensor, tokens: int) -> Tensor:
    """The last `tokens` tokens of `[B, H_kv, T, D]`, as a view."""
    return tensor[:, :, max(tensor.shape[2] - tokens, 0) :]


def entry_of(key_states: Tensor) -> tuple[int, int, int]:
    """KV heads, head dimension and bytes an element of the keys, for reports."""
    return key_states.shape[1], key_states.shape[3], key_states.element_size()


def removed_by(crop: int, seen: int) -> int:
    """How many of the `seen` tokens `Cache.crop(crop)` removes.

    transformers counts the tokens to remove as a negative number; 5.14 also passes the number to keep, a positive one.
    """
    return max(seen - crop, 0) if crop > 0 else min(-crop, seen)
