"""`StateLayer`: a layer whose past is a state of constant size (gated retention), not keys and values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from hf_kvcache.layers.common import removed_by


class StateLayer(CacheLayerMixin):
    """The state of one layer, `[B, H, D_k, D_v]`, and how many tokens went into it.

    A state cannot be rolled back, so it cannot be cropped.
    """

    is_sliding = False
    is_croppable = False
    is_compileable = False
    supports_early_init = False
    # there are no keys whose size a report could compare with
    entry = None

    def __init__(self) -> None:
        super().__init__()
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        # named as in transformers' own layers of this kind, whose models then need not ask which one they have
        self.recurrent_states: dict[int, Tensor | None] = {0: None}
        self.seen = 0
        self.is_initialized = False

    @property
    def state(self) -> Tensor | None:
        """`[B, H, D_k, D_v]`, None before the first token."""
        return self.recurrent_states[0]

    def update_recurrent_state(self, state: Tensor, state_idx: int = 0, tokens: int = 0) -> Tensor:
        """Takes the state after `tokens` more tokens."""
        self.recurrent_states[state_idx] = state
        self.seen += tokens
        self.is_initialized = True
        return state

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        raise TypeError("this layer keeps a state, not keys and values; the cache was made for another kind of model")

    def activate_past_recording(self) -> None:
        """Refuses what would have to roll the state back."""
        raise NotImplementedError(
            "assisted decoding takes rejected drafts back, but a retention layer keeps one state and cannot forget "
            "them; expected plain or beam decoding, or a YOCO model with self_decoder='window'"
        )

    def crop(self, tokens_to_remove: int) -> None:
        """Refuses to remove tokens."""
        if removed_by(tokens_to_remove, self.seen):
            raise NotImplementedError(
                f"cannot crop {removed_by(tokens_to_remove, self.seen)} tokens: a retention layer keeps one state and "
                "cannot forget them; start from a copy of the cache taken before they came"
            )

    def expect(self, prompt_length: int, copies: int) -> None:
        """Nothing to prepare."""

    def select_rows(self, rows: list[int]) -> None:
        """Makes batch row i what row `rows[i]` is now."""
        if self.state is not None:
            self.recurrent_states[0] = self.state[rows]

    def tensors(self) -> list[Tensor]:
        """Every tensor that this layer keeps alive."""
        return [] if self.state is None else [self.state]

    def describe(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What a saved file needs: a JSON-able description and the tensors by name."""
        return {"seen": self.seen}, {} if self.state is None else {"state": self.state}

    def restore(self, described: dict[str, Any], tensors: dict[str, Tensor], device: torch.device) -> None:
        """The inverse of `describe`."""
        self.reset()
        if "state" in tensors:
            self.update_recurrent_state(tensors["state"].to(device), tokens=described["seen"])

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to prepare: memory is taken when the first tokens come."""
