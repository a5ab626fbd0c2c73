"""How well keys and values can be predicted: the paper's second layer as it reads, and what beats it. Float32, CPU.

    python examples/benchmarks/sequential_predictors.py

R2 is 1 - |error|^2 / |x - mean|^2 over keys without RoPE, or values, of tokens of texts that nothing was fitted on; the
mean over layers. Linear maps are fitted to the calibration sample. A predictor saves half of log2(1 / (1 - R2)) bits a
number at best.

    expected 16   the paper read literally: keys and values of the 16 likeliest next tokens, computed by the model, in
                  the mean under their probabilities; 16 forward passes a token
    argmax        those of the likeliest token alone; one forward pass
    previous      a linear map of the same layer's keys and values of the token before
    lower-layer   a linear map of keys and values of the layer below
    lower-layer + own key    the same, and for values the key of their own layer (AQUA-KV, arXiv 2501.19392)
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from common import windows, write_results
from fidelity import texts
from sequential_rate import cache_of, read_prompt
from torch import Tensor

from hf_kvcache import patch_model
from hf_kvcache.calibration.texts import token_windows
from hf_kvcache.patches.attach import require_attached
from hf_kvcache.real_models import REAL_MODELS
from hf_kvcache.sequential.page import Context, Page

LENGTH, CANDIDATES, RIDGE = 512, 16, 1e-3
# keys and values: [2, layers, tokens, channels]
Pair = Callable[[Tensor, int], tuple[Tensor, Tensor]]


def plain(pages: list[Page], context: Context) -> Tensor:
    """Keys without RoPE, and values, `[2, L, T, C]`."""
    whole = joined(pages)
    assert context.rotate is not None
    keys = [context.rotate(layer, key, torch.arange(len(whole)), True) for layer, key in enumerate(whole.keys)]
    return torch.stack([torch.stack([x.transpose(0, 1).flatten(1) for x in kind]) for kind in (keys, whole.values)])


def joined(pages: list[Page]) -> Page:
    """Pages that follow each other as one."""
    layers = range(len(pages[0].keys))
    keys, values = (
        [torch.cat([getattr(page, kind)[layer] for page in pages], dim=1) for layer in layers]
        for kind in ("keys", "values")
    )
    return Page(np.concatenate([page.ids for page in pages]), pages[0].start, keys, values)


def previous(data: Tensor, layer: int) -> Tensor:
    """What `previous` predicts from, `[T, F]`: keys and values of the token before; the first token has none."""
    both = torch.cat([data[0, layer], data[1, layer]], dim=1)
    return torch.cat([torch.zeros_like(both[:1]), both[:-1]])


def lower(data: Tensor, layer: int) -> Tensor:
    return torch.cat([data[0, layer - 1], data[1, layer - 1]], dim=1)


def lower_and_key(data: Tensor, layer: int) -> Tensor:
    return torch.cat([lower(data, layer), data[0, layer]], dim=1)


def fitted(texts: list[Tensor], features: Callable[[Tensor, int], Tensor], kind: int, layer: int) -> Tensor:
    """The ridge regression of keys or values on features, both without their means: `[F, C]`."""
    x = torch.cat([features(text, layer)[1:] for text in texts]).double()
    y = torch.cat([text[kind, layer, 1:] for text in texts]).double()
    gram = x.T @ x
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    return torch.linalg.solve(gram, x.T @ y).float()


def r2(errors: Tensor, truth: Tensor) -> float:
    return 1 - float(errors.square().sum() / truth.square().sum())


def linear(train: list[Tensor], test: list[Tensor], features: Any, kind: int) -> float:
    """R2 of a linear predictor, the mean over the layers that have a layer below."""
    scores = []
    for layer in range(1, test[0].shape[1]):
        weight = fitted(train, features, kind, layer)
        truth = torch.cat([text[kind, layer, 1:] for text in test])
        guess = torch.cat([features(text, layer)[1:] for text in test]) @ weight
        scores.append(r2(truth - guess, truth))
    return sum(scores) / len(scores)


def candidates(model: Any, logits: Tensor, before: Page, context: Context) -> tuple[Tensor, Tensor]:
    """Probabilities `[k]` of the likeliest tokens behind a page, and the keys and values `[2, L, k, C]` of theirs."""
    attachment = require_attached(model)
    likely = logits.softmax(-1).topk(CANDIDATES)
    cache, kept = cache_of(model, [before]), {}
    cache.batch_repeat_interleave(CANDIDATES)
    for index, layer in cache.producers.items():
        layer.witness = partial(_keep, kept, index)
    at = torch.full((CANDIDATES, 1), len(before))
    decoder = attachment.adapter.find_decoder(model)
    decoder(input_ids=likely.indices[:, None], past_key_values=cache, position_ids=at, use_cache=True)
    assert context.rotate is not None
    pairs = [kept[producer] for producer in context.geometry.producers]
    keys = [context.rotate(layer, key, at[0], True) for layer, (key, _) in enumerate(pairs)]
    values = [value for _, value in pairs]
    return likely.values / likely.values.sum(), torch.stack(
        [torch.stack([x.flatten(1) for x in k]) for k in (keys, values)]
    )


def _keep(kept: dict, index: int, first: int, key: Tensor, value: Tensor) -> None:
    kept[index] = key.clone(), value.clone()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", choices=sorted(REAL_MODELS))
    parser.add_argument("--samples", type=int, default=16, help="calibration windows of 512 tokens")
    parser.add_argument("--domains", nargs="+", default=["manual", "encyclopedia"])
    parser.add_argument("--positions", type=int, default=16, help="a domain, at which the expectation is computed")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    model, tokenizer = REAL_MODELS[options.model].load()
    patch_model(model, None)
    train = []
    for row in token_windows(None, model, tokenizer, options.samples, LENGTH):
        train.append(plain(*read_prompt(model, row[None])))
    mean = torch.cat(train, dim=2).mean(2, keepdim=True)
    train = [text - mean for text in train]
    test, guesses, truths, best = [], [], [], []
    for domain in options.domains:
        ids = windows(tokenizer, texts()[domain], 1, LENGTH)[0]
        pages, context = read_prompt(model, ids[None])
        whole = joined(pages)
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
        test.append(plain(pages, context) - mean)
        for position in torch.linspace(LENGTH // 4, LENGTH - 1, options.positions).long().tolist():
            probabilities, found = candidates(model, logits[position - 1], whole.first(position), context)
            found = found - mean
            guesses.append((found * probabilities[:, None]).sum(2))
            best.append(found[:, :, 0])
            truths.append(test[-1][:, :, position])
        print(domain, "read", flush=True)
    truth, rows = torch.stack(truths), []
    computed = {f"expected {CANDIDATES}": torch.stack(guesses), "argmax": torch.stack(best)}
    for name, guess in computed.items():
        scores = [
            sum(r2((truth - guess)[:, kind, layer], truth[:, kind, layer]) for layer in range(truth.shape[2]))
            / truth.shape[2]
            for kind in range(2)
        ]
        rows.append({"predictor": name, "key": scores[0], "value": scores[1], "positions": len(truth)})
    features = {"previous": (previous, previous), "lower-layer": (lower, lower)}
    for name, (for_key, for_value) in {**features, "lower-layer + own key": (None, lower_and_key)}.items():
        key = None if for_key is None else linear(train, test, for_key, 0)
        value = linear(train, test, for_value, 1)
        rows.append({"predictor": name, "key": key, "value": value, "positions": sum(t.shape[2] - 1 for t in test)})
    for row in rows:
        print({name: f"{value:.3f}" if isinstance(value, float) else value for name, value in row.items()}, flush=True)
    write_results("sequential_predictors" + ("" if options.model == "smollm2" else f"_{options.model}"), rows)


if __name__ == "__main__":
    main()
