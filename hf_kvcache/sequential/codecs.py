"""The page codecs by name."""

from __future__ import annotations

from pathlib import Path

from hf_kvcache.fingerprint import matches
from hf_kvcache.sequential.basis import Basis
from hf_kvcache.sequential.lossless import Lossless
from hf_kvcache.sequential.page import PageCodec
from hf_kvcache.sequential.residual import Residual
from hf_kvcache.sequential.tokens import Tokens

NAMES = (Lossless.name, Residual.name, Tokens.name)


def make_codec(
    name: str,
    *,
    page_size: int,
    fingerprint: str = "",
    quality: float | None = None,
    basis: str | Path | Basis | None = None,
) -> PageCodec:
    """A codec from flat options.

    Args:
        name: one of `NAMES`.
        page_size: tokens of a full page.
        fingerprint: of the model, which a basis must be of.
        quality, basis: of `residual`; None for its defaults.

    Raises:
        ValueError: for an unknown name, a basis of another model, or an option that the codec does not have.
    """
    if name == Residual.name:
        loaded = Basis.load(basis) if isinstance(basis, (str, Path)) else basis
        if loaded is not None and not matches(loaded.fingerprint, fingerprint):
            raise ValueError(
                f"the basis was made for the model {loaded.fingerprint}, this one is {fingerprint}; "
                "make one with hf-kvcache calibrate sequential"
            )
        return Residual(Residual.quality if quality is None else quality, loaded, full=page_size)
    if quality is not None or basis is not None:
        raise ValueError(f"quality and basis belong to the codec 'residual', but the codec is {name!r}")
    if name == Tokens.name:
        return Tokens()
    if name != Lossless.name:
        raise ValueError(f"codec must be one of {', '.join(NAMES)}, got {name!r}")
    return Lossless()
