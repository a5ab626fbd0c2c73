"""`LayerSettings`: what a producer with full attention is made of, which its layer and its evictor both read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hf_kvcache.codecs import Codec
from hf_kvcache.eviction import EvictionPolicy
from hf_kvcache.stores import Store


@dataclass(frozen=True)
class LayerSettings:
    """What a producer is made of.

    Args:
        codec: how sealed entries are stored.
        store: where they are stored.
        last_reader: the last layer that reads this layer's KV, itself included.
        policy: which tokens are kept; None to keep all.
        place: this layer's place among those that evict.
        readers: for every layer that evicts, the layers that read its KV.
        output: the attribute of an attention module that projects its heads to the residual stream.
    """

    codec: Codec
    store: Store
    last_reader: int
    policy: EvictionPolicy | None = None
    place: int = 0
    readers: tuple[tuple[int, ...], ...] = ((0,),)
    output: str = "o_proj"

    @property
    def shared(self) -> bool:
        """Whether other layers read this one's KV."""
        return len(self.readers[self.place]) > 1

    @property
    def deferred(self) -> bool:
        """Whether the prompt waits, dense, for a decision over all layers."""
        return self.policy is not None and self.policy.deferred

    @property
    def changes(self) -> bool:
        """Whether a sealed prompt is less than the prompt."""
        return self.policy is not None or self.codec.lossy

    def residual(self, lengths: Sequence[int]) -> int:
        """How many of the last tokens of a prompt stay dense: those that the codec asks for and eviction leaves alone.

        None do where eviction goes on while decoding: it judges all that came after what is sealed, by its queries, and
        those of the prompt are gone by then.

        Args:
            lengths: tokens of every row of the batch, without padding. All rows have one tail, so that the row with the
                fewest tokens that are always kept decides; one that loses nothing has no say.
        """
        wanted, policy = self.codec.residual_length, self.policy
        if policy is None or not wanted:
            return wanted
        if policy.every:
            return 0
        windows = ((policy.limits(length).window, length) for length in lengths)
        return min([wanted, *(window for window, length in windows if window < length)])

    def __deepcopy__(self, memo) -> LayerSettings:
        return self
