"""The interface of what keeps prompts between runs (`sequential`): one session for every prompt of a cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from hf_kvcache.spec import CacheSpec


class PrefixSource(Protocol):
    """Where caches of a spec look up what they are to read, and leave what they have read."""

    def session(self, spec: CacheSpec, prompt_length: int) -> Any:
        """A `sequential.session.PromptSession` for one prompt of `prompt_length` columns, padding included."""
        ...

    def close(self) -> None:
        """Lets go of what it opened itself, once the model is unpatched; caches that go on open that again."""
        ...
