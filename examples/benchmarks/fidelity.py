"""The fidelity protocol: KL to the untouched model and bytes held, over five domains.

The first 1,024 tokens of a window are the prompt, the next 160 are teacher-forced through the cache. KL is
KL(untouched || method), in nats a token. No domain is in the calibration sample.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import mean
from typing import Any

import torch
from common import TEST_TEXTS, evaluation_texts, windows
from peer_backends import opened
from torch import Tensor

from hf_kvcache import Method, patch_model, unpatch_model
from hf_kvcache.measure import Continuation, continuation, continued, kl_divergence, top1_agreement

PREFIX, SCORED = 1024, 160


def texts() -> dict[str, str]:
    """The texts of the domains."""
    return {**evaluation_texts(), "novel": (TEST_TEXTS / "novel.txt").read_text(encoding="utf-8")}


class Fidelity:
    """Scores methods on the same windows.

    Args:
        model: unpatched, in float32.
        tokenizer: of the model.
        count: windows a domain.
    """

    def __init__(self, model: Any, tokenizer: Any, count: int) -> None:
        self.model, self.tokenizer, self.count = model, tokenizer, count
        self.ids = {domain: windows(tokenizer, text, count, PREFIX + SCORED + 1) for domain, text in texts().items()}
        self.full = {
            domain: [continuation(model, window[None], PREFIX) for window in ids] for domain, ids in self.ids.items()
        }

    def of_method(self, name: str, method: Method | str | None, **options: Any) -> list[dict[str, Any]]:
        """Rows of a method of ours."""
        patch_model(self.model, method, tokenizer=self.tokenizer, **options)
        try:
            return self._rows(name, lambda ids: continuation(self.model, ids, PREFIX))
        finally:
            unpatch_model(self.model)

    def of_peer(self, name: str) -> list[dict[str, Any]]:
        """Rows of one of transformers' caches, named as in `peer_backends.py`."""
        with opened("transformers", self.model, self.tokenizer, name, None) as peer:

            def answer(ids: Tensor) -> Continuation:
                cache = peer.prefill(ids[:, :PREFIX])
                held = peer.held_bytes(cache)
                found = continued(self.model, cache, ids[:, PREFIX:], PREFIX)
                return Continuation(found.log_probs, found.targets, held)

            return self._rows(name, answer)

    @torch.no_grad()
    def _rows(self, name: str, answer: Callable[[Tensor], Continuation]) -> list[dict[str, Any]]:
        """One row a domain and their mean."""
        scores: list[dict[str, Any]] = []
        for domain, ids in self.ids.items():
            pairs = [(full, answer(window[None])) for full, window in zip(self.full[domain], ids, strict=True)]
            scores.append(
                {
                    "domain": domain,
                    "kl": mean(kl_divergence(*pair) for pair in pairs),
                    "loss_increase": mean(after.loss - before.loss for before, after in pairs),
                    "top1": mean(top1_agreement(*pair) for pair in pairs),
                    "kv_bytes_of_full": mean(after.kv_bytes / before.kv_bytes for before, after in pairs),
                }
            )
        scores.append({"domain": "mean", **{key: mean(s[key] for s in scores) for key in list(scores[0])[1:]}})
        print(name, f"KL {scores[-1]['kl']:.5f}", f"bytes {scores[-1]['kv_bytes_of_full']:.4f}", flush=True)
        return [{"method": name, "windows": self.count, **score} for score in scores]
