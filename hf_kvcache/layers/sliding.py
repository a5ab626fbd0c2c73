"""`SlidingLayer`: a producer with sliding-window attention, which keeps what its window can see."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hf_kvcache.attention import AttentionCall, attend_windows
from hf_kvcache.kernels.decode_attention import decode_attention
from hf_kvcache.layers.common import OwnLayer, Witness, entry_of, last_tokens, refuse_backward, removed_by


class SlidingLayer(OwnLayer):
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

    keys: Tensor
    values: Tensor

    def __init__(self, sliding_window: int, last_reader: int) -> None:
        super().__init__()
        self.sliding_window, self.last_reader = sliding_window, last_reader
        self.record_past = False
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        self.keys = self.values = torch.empty(0)
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
        visible = self._reach() + key_states.shape[2]
        self._append(key_states, value_states)
        self._visible = last_tokens(self.keys, visible), last_tokens(self.values, visible)
        return self, self

    def adopt(self, key: Tensor, value: Tensor) -> None:
        """Takes key and value `[B, H_kv, n, D]` of the next tokens of the prompt as an earlier forward left them."""
        self._append(key, value)
        if not self.record_past:
            self._hold(self._reach())

    def _append(self, key: Tensor, value: Tensor) -> None:
        """Adds tokens to those held."""
        self.entry = entry_of(key)
        self.seen += key.shape[2]
        if self.is_initialized:
            key, value = torch.cat([self.keys, key], dim=2), torch.cat([self.values, value], dim=2)
        self.keys, self.values, self.is_initialized = key, value, True

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
            self._hold(self.keys.shape[2] if self.record_past else self._reach())
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

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._reach() + query_length, self.seen - self._reach()

    def get_max_length(self) -> int:
        return self.sliding_window

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
