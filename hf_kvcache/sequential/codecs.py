"""The page codecs by name."""

from __future__ import annotations

from pathlib import Path

from hf_kvcache.fingerprint import matches
from hf_kvcache.sequential.auto import Auto
from hf_kvcache.sequential.basis import Basis
from hf_kvcache.sequential.lossless import Lossless
from hf_kvcache.sequential.page import PageCodec
from hf_kvcache.sequential.residual import PLAIN_QUALITY, Residual
from hf_kvcache.sequential.tokens import Tokens

NAMES = (Lossless.name, Residual.name, Tokens.name, Auto.name)


def make_codec(
    name: str,
    *,
    page_size: int,
    fingerprint: str = "",
    quality: float | None = None,
    basis: str | Path | Basis | None = None,
    bandwidth: float | None = None,
    prefill_rate: float | None = None,
) -> PageCodec:
    """A codec from flat options.

    Args:
        name: one of `NAMES`.
        page_size: tokens of a full page.
        fingerprint: of the model, which a basis must be of.
        quality, basis: of `residual`; None for its defaults. `auto` chooses between `lossless` and `tokens`, and
            `residual` where one of them is given.
        bandwidth, prefill_rate: of `auto`; None to measure them.

    Raises:
        ValueError: for an unknown name, a basis of another model, or an option that the codec does not have.
    """
    if name not in NAMES:
        raise ValueError(f"codec must be one of {', '.join(NAMES)}, got {name!r}")
    lossy = quality is not None or basis is not None
    if lossy and name not in (Residual.name, Auto.name):
        raise ValueError(f"quality and basis belong to the codec 'residual', but the codec is {name!r}")
    if (bandwidth is not None or prefill_rate is not None) and name != Auto.name:
        raise ValueError(f"bandwidth and prefill_rate belong to the codec 'auto', but the codec is {name!r}")
    if name == Residual.name:
        return _residual(page_size, fingerprint, quality, basis)
    if name == Auto.name:
        also = (_residual(page_size, fingerprint, quality, basis),) if lossy else ()
        return Auto((Lossless(), *also), bandwidth, prefill_rate)
    return Tokens() if name == Tokens.name else Lossless()


def _residual(page_size: int, fingerprint: str, quality: float | None, basis: str | Path | Basis | None) -> Residual:
    loaded = Basis.load(basis) if isinstance(basis, (str, Path)) else basis
    if loaded is not None and not matches(loaded.fingerprint, fingerprint):
        raise ValueError(
            f"the basis was made for the model {loaded.fingerprint}, this one is {fingerprint}; "
            "make one with hf-kvcache calibrate sequential"
        )
    default = PLAIN_QUALITY if loaded is None else Residual.quality
    return Residual(default if quality is None else quality, loaded, full=page_size)
