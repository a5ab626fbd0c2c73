"""`Identity`: what two runs must agree on to share pages, and the keys of pages, which are hashes that include it.

A key is the hash of the parent's key and of the page's own token ids; the key of the root is the hash of the identity.
So a key says everything about a page: which tokens came before it, which model computed it, how it is coded. Pages of
another model, another plan or another tenant are not refused: they are never found.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

KEY = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Identity:
    """What the keys and values of a prefix depend on, beside its tokens.

    Args:
        fingerprint: of the model (`hf_kvcache.fingerprint`), RoPE settings included.
        weights: digest of all weights in force, adapters included, and of all settings (`fingerprint.model_digest`).
        dtype: of keys and values.
        source_layers: the sharing plan; a consumer's layer stores nothing.
        codec: of the pages, with the options that change what is restored.
        page_size: tokens of a full page.
        namespace: of a tenant (`PrefixStore.tenant`); its prefixes are matched by nobody else.
    """

    fingerprint: str
    weights: str
    dtype: str
    source_layers: tuple[int, ...]
    codec: str
    page_size: int
    namespace: str = ""

    @property
    def root(self) -> str:
        """The key that stands for the empty prefix."""
        return hashlib.sha256(b"hf_kvcache.page/1\0" + json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


def page_key(parent: str, ids: Sequence[int] | np.ndarray) -> str:
    """The key of the page of `ids` behind the page `parent`."""
    return hashlib.sha256(bytes.fromhex(parent) + np.asarray(ids, dtype="<u4").tobytes()).hexdigest()


def common_prefix(one: Sequence[int] | np.ndarray, other: Sequence[int] | np.ndarray) -> int:
    """How many tokens two sequences begin with alike."""
    length = min(len(one), len(other))
    differ = np.nonzero(np.asarray(one[:length]) != np.asarray(other[:length]))[0]
    return int(differ[0]) if len(differ) else length


def require_key(key: str) -> str:
    """`key`, when it is one; anything else, a path for example, is refused."""
    if not isinstance(key, str) or not KEY.fullmatch(key):
        raise ValueError(f"a page key is 64 hexadecimal digits, got {key!r}")
    return key
