"""What the layers of a cache share."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from hf_kvcache.kernels.library import refuse_gradient

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


def refuse_backward(out: Tensor) -> Tensor:
    """The output of attention over constants of the cache by an operator that has a gradient: its backward raises."""
    if out.requires_grad:
        out.register_hook(refuse_gradient("attention"))
    return out


class OwnLayer(CacheLayerMixin):
    """What transformers asks of any layer of a cache, for those that hold something of their own."""

    is_compileable = False
    supports_early_init = False

    # whether a `crop` follows every forward; transformers knows it by this name and takes it back when it has finished
    record_past = False
    # tokens that went into this layer
    seen: int

    def expect(self, prompt_length: int, copies: int) -> None:
        """Announces the prompt: its length in tokens, and how many rows of the batch are copies of each prompt."""

    @property
    def shape(self) -> None:
        """Asked for by attention that is not ours, which takes what `update` gives for keys."""
        raise ValueError(
            "this cache is for patched models, and was given to one that is not; call patch_model first, with the "
            "method that the cache was made for"
        )

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to prepare: memory is taken when the first tokens come."""
