"""A conversation as its tokens: the smallest file that a cache can be made from again, by reading them once more.

save_tokens(model, ids, "chat.tokens")              # packed ids, about two bytes a token
save_tokens(model, ids, "chat.tokens", coder="lm")  # range coded under the model, about half a byte
cache = compress(model, load_tokens(model, "chat.tokens"))  # a prefill; on the same machine the same bit for bit
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_kvcache.fingerprint import fingerprint, matches
from hf_kvcache.sequential import lm_coder, pagefile
from hf_kvcache.sequential.lm_coder import CodedTokens
from hf_kvcache.sequential.packing import PageError, pack_ids, unpack_ids

CODERS = ("packed", "lm")
# longest conversation that is believed
MOST_TOKENS = 1 << 24


def save_tokens(model: Any, ids: Tensor, path: str | Path, *, coder: str = "packed") -> dict[str, float]:
    """Writes token ids `[T]` or `[1, T]`.

    Args:
        model: whose ids they are; with `coder="lm"` it codes them.
        ids: the tokens.
        path: of the file.
        coder: `"packed"`, or `"lm"`: two runs through the text, one token at a time; falls back to packed ids where
            the second run does not give the tokens back.

    Returns:
        `bits` a token in the file, all headers in, and `surprisal`, 0 for packed ids.
    """
    if coder not in CODERS:
        raise ValueError(f"coder must be one of {', '.join(CODERS)}, got {coder!r}")
    row = ids.reshape(-1).cpu()
    if not 0 < len(row) <= MOST_TOKENS:
        raise ValueError(f"expected 1 to {MOST_TOKENS} tokens, got {len(row)}")
    coded = _coded(model, row) if coder == "lm" else None
    description = {"codec": "tokens", "tokens": len(row), "model": fingerprint(model)}
    if coded is not None:
        page = pagefile.PageFile({**description, "coder": "lm", "digest": _digest(row)}, {"lm": coded.rows[0]})
    else:
        bits, packed = pack_ids(row.numpy())
        page = pagefile.PageFile({**description, "coder": "packed", "bits": bits}, {"ids": packed})
    data = pagefile.dump(page)
    Path(path).write_bytes(data)
    return {"bits": 8 * len(data) / len(row), "surprisal": 0.0 if coded is None else coded.surprisal}


def load_tokens(model: Any, path: str | Path) -> Tensor:
    """The ids `[1, T]` of a file that `save_tokens` wrote; `hf_kvcache.compress(model, ids)` makes the cache of them.

    Raises:
        ValueError: for a file that is damaged, foreign, of a later format or of another model, or that was coded under
            the model where it computes other probabilities.
    """
    page = pagefile.load(Path(path).read_bytes(), most=lambda header: 4 * _count(header) + 64)
    header, sections = page.description, page.sections
    if header.get("codec") != "tokens" or not isinstance(header.get("model"), str):
        raise PageError(f"{path} does not hold tokens; write it with save_tokens")
    own = fingerprint(model)
    if not matches(header["model"], own):
        raise PageError(f"{path} holds tokens of the model {header['model'][:40]}, this one is {own}")
    if header.get("coder") == "lm" and "lm" in sections:
        if len(sections["lm"]) % 4:
            raise PageError(f"{path} holds {len(sections['lm'])} bytes of code, expected a multiple of 4")
        return _decoded(model, CodedTokens((bytes(sections["lm"]),), header["tokens"], 0.0), header.get("digest"), path)
    if type(header.get("bits")) is not int or "ids" not in sections:
        raise PageError(f"{path} holds neither packed nor coded ids")
    ids = unpack_ids(header["bits"], sections["ids"], header["tokens"])
    return torch.from_numpy(ids.astype("int64"))[None]


def _coded(model: Any, row: Tensor) -> CodedTokens | None:
    """Ids `[T]` coded under the model; None where they do not come back."""
    try:
        coded = lm_coder.encode(model, row[None])
        return coded if torch.equal(lm_coder.decode(model, coded)[0], row) else None
    except AssertionError:
        # what constriction raises for probabilities or a code that cannot be
        return None


def _decoded(model: Any, coded: CodedTokens, digest: Any, path: str | Path) -> Tensor:
    """The ids `[1, T]` that were coded; a code has no redundancy by which it would tell others itself."""
    try:
        ids = lm_coder.decode(model, coded)
    except AssertionError:
        ids = None
    if ids is None or _digest(ids[0]) != digest:
        raise PageError(
            f"{path} does not give its tokens back: the model computes other probabilities than when they were saved. "
            "Load them on the same machine, with the same dtype, device and number of threads; save with "
            "coder='packed' what is to be read elsewhere"
        )
    return ids


def _digest(row: Tensor) -> str:
    return hashlib.blake2b(row.cpu().numpy().astype("<u4").tobytes(), digest_size=8).hexdigest()


def _count(header: dict[str, Any]) -> int:
    tokens = header.get("tokens")
    if type(tokens) is not int or not 0 < tokens <= MOST_TOKENS:
        raise PageError(f"a file of tokens must say how many, from 1 to {MOST_TOKENS}")
    return tokens
