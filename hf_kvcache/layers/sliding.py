"""`SlidingLayer`: a producer with sliding-window attention, which keeps what its window can see."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hf_kvcache.attention import AttentionCall, attend_windows
from hf_kvcache.kernels.decode_attention import decode_attention
from hf_kvcache.layers.common import OwnLayer, Witness, entry_of, last_tokens, refuse_backward, removed_by
from hf_kvcache.tail import Tail


class SlidingLayer(OwnLayer):
    """The KV of one producer with sliding-window attention: the last `sliding_window - 1` tokens, dense, in a tail.

    That is all that later tokens can see, so nothing more is kept but room for a few new ones, unless the caller
    announces with `activate_past_recording` that a `crop` follows every forward (assisted decoding): then older tokens
    stay until that crop. Consumers read the keys and values of the present forward, as the layer itself does.

    Args:
        sliding_window: tokens that a query sees, itself included.
        last_reader: the last layer that reads this layer's KV, itself included.
    """

    is_sliding = True
    is_croppable = True

    def __init__(self, sliding_window: int, last_reader: int) -> None:
        super().__init__()
        self.sliding_window, self.last_reader = sliding_window, last_reader
        self.record_past = False
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        self.tail = Tail()
        self.is_initialized = False
        self.seen = 0
        self.entry: tuple[int, int, int] | None = None
        self._visible: tuple[Tensor, Tensor] | None = None
        self.witness: Witness | None = None

    def activate_past_recording(self) -> None:
        """Announces that a `crop` follows every forward."""
        self.record_past = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        """Takes key and value `[B, H_kv, L, D]` of the new tokens and returns this layer in their place, twice."""
        if self.witness is not None:
            self.witness(self.seen, key_states, value_states)
        self._visible = self._take(key_states, value_states)
        self._count(key_states)
        return self, self

    def _take(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Adds new tokens to those held; returns what they can see, themselves included."""
        tail, reach = self.tail, self._reach()
        if not self.is_initialized:
            # a prompt is read once and cut to the window: room behind it would be in vain
            tail.adopt(key.detach(), value.detach())
            return key, value
        reach += key.shape[2]
        if key.shape[2] > 1 or torch.is_grad_enabled():
            # so is a part of one. A gradient needs the new tokens as they came, in what nothing is written into later
            key, value = torch.cat([tail.key, key], dim=2), torch.cat([tail.value, value], dim=2)
            tail.adopt(key.detach(), value.detach())
        else:
            tail.append(key, value)
            key, value = tail.key, tail.value
        return last_tokens(key, reach), last_tokens(value, reach)

    def adopt(self, key: Tensor, value: Tensor) -> None:
        """Takes key and value `[B, H_kv, n, D]` of the next tokens of the prompt as an earlier forward left them."""
        self.tail.append(key, value)
        self._count(key)
        if not self.record_past:
            self.tail.keep_last(self._reach())

    def _count(self, key: Tensor) -> None:
        """Counts the tokens of these keys."""
        self.entry, self.is_initialized = entry_of(key), True
        self.seen += key.shape[2]

    def attend(self, call: AttentionCall) -> Tensor:
        """Attention over the window; returns `[B, L, H_q, D]`."""
        assert self._visible is not None
        key, value = self._visible
        call = call.to(key.device)
        if call.mask is None and 1 < self.sliding_window < call.length:
            out = attend_windows(
                lambda query, key, value, mask: replace(call, query=query, mask=mask).dense(key, value),
                call.query,
                key,
                value,
                self.sliding_window,
            )
        elif call.length > 1:
            out = call.dense(key, value)
        else:
            query = call.folded_query(key.shape[1])
            mask = call.folded_mask(query.shape[2], key.shape[2])
            out = call.unfolded(decode_attention(query, key, value, mask, scale=call.scale, softcap=call.softcap)[0])
        out = refuse_backward(out) if self.seen > call.length else out
        if call.layer == self.last_reader:
            self._visible = None
            self.tail.keep_last(self.tail.length if self.record_past else self._reach())
        return out

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last `-tokens_to_remove` tokens, and what was recorded beyond the window."""
        remove = removed_by(tokens_to_remove, self.seen)
        if not self.is_initialized:
            return
        rest, needed = self.tail.length - remove, min(self.seen - remove, self.sliding_window - 1)
        if rest < needed:
            raise RuntimeError(
                f"cannot crop {remove} tokens: the {needed - rest} tokens that would come back into the window of "
                f"{self.sliding_window} are gone; call cache.activate_past_recording() before the forward"
            )
        self.seen -= remove
        self.tail.crop(remove)
        self.tail.keep_last(needed)

    def select_rows(self, rows: list[int]) -> None:
        """Makes batch row i what row `rows[i]` is now (beam search, repetition, selection)."""
        self.tail.select_rows(rows)

    def tensors(self) -> list[Tensor]:
        """Every tensor that this layer keeps alive."""
        return [*self.tail.tensors(), *(self._visible or ())]

    def describe(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What a saved file needs: a JSON-able description and the tensors by name."""
        tensors = {"keys": self.tail.key, "values": self.tail.value} if self.is_initialized else {}
        return {"seen": self.seen, "entry": self.entry}, tensors

    def restore(self, described: dict[str, Any], tensors: dict[str, Tensor], device: torch.device) -> None:
        """The inverse of `describe`."""
        self.reset()
        if tensors:
            self.tail.adopt(tensors["keys"].to(device), tensors["values"].to(device))
            self.is_initialized = True
        self.seen, self.entry = described["seen"], tuple(described["entry"]) if described["entry"] else None

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._reach() + query_length, self.seen - self._reach()

    def get_max_length(self) -> int:
        return self.sliding_window

    def _reach(self) -> int:
        """How many of the tokens seen the next one can see."""
        return min(self.seen, self.sliding_window - 1)
