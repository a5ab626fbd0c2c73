"""What the layers of a cache share."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

# sees the first column, key and value [B, H_kv, n, D] of everything that a layer computes
Witness = Callable[[int, Tensor, Tensor], None]


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
