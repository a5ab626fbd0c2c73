"""`StoreSource`: a store and how to write to it, as a spec holds them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from hf_kvcache.sequential.identity import Identity
from hf_kvcache.sequential.page import PageCodec
from hf_kvcache.sequential.session import PromptSession
from hf_kvcache.sequential.store import PrefixStore
from hf_kvcache.spec import CacheSpec


@dataclass(frozen=True)
class StoreSource:
    """Fills the slot `prefix` of a spec.

    Args:
        store: where pages are.
        codec: to write them with.
        owned: whether the store was opened for this, and not by the user, who may have other uses for it.
    """

    store: PrefixStore
    codec: PageCodec
    owned: bool = False

    def session(self, spec: CacheSpec, prompt_length: int) -> PromptSession:
        """A session for one prompt."""
        identity = partial(self.identity, spec)
        queries = 0 if spec.eviction is None else spec.eviction.scorer.queries
        return PromptSession(self.store, self.codec, identity, prompt_length, queries)

    def identity(self, spec: CacheSpec, weights: str, dtype: str) -> Identity:
        """What pages of a model under this spec are found by."""
        return Identity(
            spec.fingerprint,
            weights,
            dtype,
            spec.sharing.source_layers,
            self.codec.identity,
            self.store.page_size,
            self.store.tenant,
        )

    def close(self) -> None:
        """Writes what waits and closes the store, unless it is the user's."""
        if self.owned:
            self.store.close()
