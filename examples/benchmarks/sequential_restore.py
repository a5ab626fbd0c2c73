"""Time to the first token for a prompt whose prefix is in a store, beside prefill and a plain load. Float32, CPU.

    python examples/benchmarks/sequential_restore.py prepare --folder /tmp/restore --basis basis.safetensors
    python examples/benchmarks/sequential_restore.py measure --folder /tmp/restore --basis basis.safetensors

The prompt is a prefix of so many tokens of a manual and a question of 32, another one in every repetition. `prefill`
reads all of it; `lossless` and `residual` adopt the prefix from pages in a folder and read the question; `raw` loads
the prefix as one safetensors file (`KVCache.save`) and reads the question. Files are warm in the system's cache.
`speedup` is against prefill. With one thread seconds are the processor's.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import windows, write_results
from fidelity import texts
from interleaved import now
from sequential_rate import cache_of, read_prompt
from torch import Tensor

from hf_kvcache import Sequential, load_cache, patch_model, unpatch_model
from hf_kvcache.fingerprint import model_digest
from hf_kvcache.patches.attach import require_attached
from hf_kvcache.real_models import REAL_MODELS
from hf_kvcache.sequential.basis import Basis
from hf_kvcache.sequential.codecs import make_codec
from hf_kvcache.sequential.page import PageCodec
from hf_kvcache.sequential.residual import Residual
from hf_kvcache.sequential.store import PrefixStore

QUESTION = 32


def codecs(basis: Basis, quality: float, fingerprint: str) -> dict[str, PageCodec]:
    options: dict[str, Any] = {"page_size": 256, "fingerprint": fingerprint}
    return {
        "lossless": make_codec("lossless", **options),
        "residual": make_codec("residual", quality=quality, basis=basis, **options),
    }


def prompt(tokenizer: Any, length: int) -> Tensor:
    """`[1, length + QUESTION]`; shorter prefixes are not the beginning of longer ones."""
    ids = windows(tokenizer, texts()["manual"], 7, length + QUESTION)
    return ids[length % 5][None]


def prepare(model: Any, tokenizer: Any, basis: Basis, lengths: list[int], folder: Path, quality: float) -> None:
    """Writes the prefixes as pages of both codecs and as plain files."""
    for length in lengths:
        ids = prompt(tokenizer, length)[:, :length]
        patch_model(model, None)
        pages, context = read_prompt(model, ids)
        cache_of(model, pages).save(folder / f"{length}.safetensors")
        for name, codec in codecs(basis, quality, basis.fingerprint).items():
            store = PrefixStore(folder / name)
            patch_model(model, Sequential(store=store, codec=codec))
            attachment = require_attached(model)
            weights = model_digest(attachment.adapter.find_decoder(model))
            parent = attachment.spec.prefix.identity(attachment.spec, weights, str(model.dtype)).root
            for page in pages:
                parent = store.put(page, parent, codec, context)
        print("prepared", length, flush=True)


def first_token(model: Any, ids: Tensor, cache: Any = None) -> tuple[float, int]:
    """Seconds of a call of generate that makes one token, and the token."""
    began = now()
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=1, do_sample=False
    )
    return now() - began, int(out[0, -1])


def loaded(model: Any, ids: Tensor, path: Path) -> tuple[float, int]:
    began = now()
    cache = load_cache(model, path)
    _, token = first_token(model, ids, cache)
    return now() - began, token


def measure(model: Any, tokenizer: Any, basis: Basis, lengths: list[int], folder: Path, options: Any) -> None:
    rows = []
    first_token(model, prompt(tokenizer, 64))
    for length in lengths:
        ids = prompt(tokenizer, length)
        times: dict[str, list[float]] = {}
        tokens: dict[str, int] = {}
        adopted: dict[str, int] = {}
        for _ in range(options.prefills):
            seconds, tokens["prefill"] = first_token(model, ids)
            times.setdefault("prefill", []).append(seconds)
        patch_model(model, None)
        for _ in range(options.repetitions):
            seconds, tokens["raw"] = loaded(model, ids, folder / f"{length}.safetensors")
            times.setdefault("raw", []).append(seconds)
        for name, codec in codecs(basis, options.quality, basis.fingerprint).items():
            for repetition in range(options.repetitions):
                store = PrefixStore(folder / name)
                patch_model(model, Sequential(store=store, codec=codec))
                # what one repetition asks, and the store keeps, the next one does not; the last one asks as the others
                question = ids[:, length:].roll(options.repetitions - 1 - repetition, dims=1)
                seconds, tokens[name] = first_token(model, torch.cat([ids[:, :length], question], dim=1))
                times.setdefault(name, []).append(seconds)
                adopted[name] = store.counts.adopted_tokens
        unpatch_model(model)
        for name, measured in times.items():
            rows.append(
                {
                    "way": name,
                    "prefix": length,
                    "seconds": median(measured),
                    "speedup": median(times["prefill"]) / median(measured),
                    "adopted_tokens": adopted.get(name),
                    "token_of_prefill": tokens[name] == tokens["prefill"],
                    "repetitions": len(measured),
                }
            )
            print(
                {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in rows[-1].items()},
                flush=True,
            )
    write_results("sequential_restore" + ("" if options.model == "smollm2" else f"_{options.model}"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("prepare", "measure"))
    parser.add_argument("--model", default="smollm2", choices=sorted(REAL_MODELS))
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--basis", type=Path, required=True)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096, 7680])
    parser.add_argument("--quality", type=float, default=Residual.quality)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--prefills", type=int, default=1)
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    options.folder.mkdir(parents=True, exist_ok=True)
    model, tokenizer = REAL_MODELS[options.model].load()
    basis = Basis.load(options.basis)
    if options.part == "prepare":
        prepare(model, tokenizer, basis, options.lengths, options.folder, options.quality)
    else:
        measure(model, tokenizer, basis, options.lengths, options.folder, options)


if __name__ == "__main__":
    main()
