"""`Sequential`: a codec for *stored, offloaded and shared* caches; it does not shrink the cache that attention reads.

Prompts are kept in a store of pages, and a prompt that begins like an earlier one is not read again: what a run adopts
is materialised and then held as the other methods say. The paper (arXiv 2604.15356) has two layers: prefixes that
sessions share are stored once (`sequential.store`), and each page is coded (`codec`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from hf_kvcache.methods.method import CalibrationModel, Method
from hf_kvcache.spec import STATE, CacheSpec

if TYPE_CHECKING:
    from hf_kvcache.sequential.basis import Basis
    from hf_kvcache.sequential.page import PageCodec
    from hf_kvcache.sequential.store import PrefixStore


@dataclass(frozen=True)
class Sequential(Method):
    """Keeps prompts in a store and reads only what is not there; what attention reads stays as large as it is.

    Prompts are stored as the attention of the prompt saw them, before eviction and codes, so one store serves all
    compositions, and with a codec that loses nothing a hit gives the tokens of a cold run.

    Args:
        store: a folder or a URL of fsspec or Redis, opened here and closed when the model is unpatched or patched anew;
            or a `PrefixStore`, which has more options and is closed by who made it.
        store_options: for the driver of a URL, as fsspec or Redis takes them: `{"endpoint_url": "http://host:9000"}`,
            `{"profile": "work"}`. A `PrefixStore` has been given them itself.
        codec: `"lossless"`; `"residual"`, which is lossy and small; `"tokens"`, which stores no keys and values at all;
            `"auto"`, for every page the one that brings it back soonest (`sequential.auto`); or a page codec of your
            own.
        quality: of `residual`: the higher, the finer the step (see `sequential.residual`); None for its default.
        basis: of `residual`: what `hf-kvcache calibrate sequential` wrote; None to do without, at more bytes.
            With `auto`, `residual` is chosen only where one of these two allows it.
        bandwidth: of `auto`, bytes a second from the store; None to measure it.
        prefill_rate: of `auto`, tokens a second; None to measure it.

    Example:
        >>> patch_model(model, "sequential", store="prompts")
        >>> patch_model(model, "sequential", store="s3://bucket/prompts", store_options={"profile": "work"})
    """

    name: ClassVar[str] = "sequential"
    slot: ClassVar[str] = "prefix"
    paper: ClassVar[str] = "arXiv 2604.15356"

    store: str | Path | PrefixStore | None = None
    codec: str | PageCodec = "lossless"
    quality: float | None = None
    basis: str | Path | Basis | None = None
    bandwidth: float | None = None
    prefill_rate: float | None = None
    # not shown, since there may be passwords in it
    store_options: Mapping[str, Any] | None = field(default=None, repr=False)

    def __post_init__(self):
        if self.store is None or self.store == "":
            raise ValueError("sequential needs a place for its pages; give store= a folder, a URL or a PrefixStore")
        options: Any = self.store_options
        if options is not None and not isinstance(options, Mapping):
            given = type(options).__name__
            raise TypeError(f'store_options must be a mapping such as {{"profile": "work"}}, got a {given}')
        if options and not isinstance(self.store, (str, Path)):
            raise ValueError(
                f"store_options are for a folder or a URL that is opened here, got a {type(self.store).__name__}; "
                "give them to it: PrefixStore(url, options=...)"
            )

    def apply(self, spec: CacheSpec, model: CalibrationModel) -> CacheSpec:
        from hf_kvcache.sequential.codecs import make_codec
        from hf_kvcache.sequential.source import StoreSource
        from hf_kvcache.sequential.store import PrefixStore

        if STATE in spec.sliding_windows:
            raise NotImplementedError(
                "sequential stores keys and values, but this model has retention layers, which keep a state; "
                "use a YOCO model with self_decoder='window'"
            )
        store = self.store
        if isinstance(store, (str, Path)):
            store = PrefixStore(store, options=self.store_options)
        if not isinstance(store, PrefixStore):
            raise TypeError(f"store must be a folder, a URL or a PrefixStore, got {type(store).__name__}")
        codec = self.codec
        if isinstance(codec, str):
            options: dict[str, Any] = {
                name: getattr(self, name) for name in ("quality", "basis", "bandwidth", "prefill_rate")
            }
            codec = make_codec(codec, page_size=store.page_size, fingerprint=spec.fingerprint, **options)
        return spec.fill("prefix", StoreSource(store, codec, owned=store is not self.store), by=self.name)
