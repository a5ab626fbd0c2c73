"""Long generations with a tiny random model: does memory stay flat, and does anything drift?

    python examples/benchmarks/long_generation.py eviction     # 20,000 tokens under every=64, budget=256
    python examples/benchmarks/long_generation.py turboquant   # 10,000 tokens in 4 bits, sealed 128 at a time

`eviction` samples tokens from a llama of two layers, and from a padded batch of two rows of a qwen3 (both: three query
heads a KV head). Every 21 tokens, so that all phases of the interval of 64 come by, it takes the live bytes of the
cache and looks at the columns held. The first thousand tokens of streamingllm and tova are computed a second time by
`PlainLoop`, which has nothing of this library in it: an unpatched model that keeps all keys, lists of the columns to
keep, and dense attention over those.

`turboquant` reads forced tokens one by one, once with a dense cache and once in 4 bits, and compares the keys and
values held, by their age, with those that the cache was given and with those of the dense cache. In the upper layer the
latter also differ because the lower one attends to codes: later tokens more than earlier ones, and the prompt not at
all. Beside it stands what a cache that encodes its whole history anew at every flush makes of the dense keys and values
(`encoded_anew`), as transformers' `QuantizedLayer` does. What that costs depends on the code: a grid from least to
largest number finds itself again and loses nothing, but keys from which the mean of all keys is taken, another one at
every flush, get worse with every flush that they live through.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from common import write_results
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import sdpa_mask

from hf_kvcache import KVCache, new_cache, patch_model
from hf_kvcache.codecs import Codec, TurboQuantCodec, UniformCodec
from hf_kvcache.report import kept_positions
from hf_kvcache.testing import left_pad, live_bytes, random_ids, rms, tiny_model

BUDGET, EVERY = 256, 64
SAMPLED_EVERY = 21
SIZES = {"num_hidden_layers": 2}
# method -> how many of the first and of the last tokens it promises to hold
METHODS = {"streamingllm": (4, BUDGET - 4), "tova": (0, 0), "h2o": (0, BUDGET // 2), "adakv": (0, 64)}
PROMPTS = {"llama": (300,), "qwen3": (300, 180)}


@dataclass
class Run:
    """What was seen of one generation.

    Args:
        tokens: `[B, prompt + generated]`, padding included.
        mask: of the prompt, `[B, prompt]`.
        bytes: live bytes of the cache, at every sample.
        logits: of the first tokens generated, `[B, n, vocabulary]`.
        most_kept: tokens held by a KV head, see `check_columns`.
    """

    tokens: Tensor
    mask: Tensor
    cache: KVCache
    bytes: list[int] = field(default_factory=list)
    logits: Tensor = field(default_factory=lambda: torch.empty(0))
    most_kept: int = 0


@torch.no_grad()
def generate(family: str, method: str, tokens: int, compared: int) -> Run:
    """Samples `tokens` tokens under eviction and checks the columns held; raises when they drift."""
    model = patch_model(tiny_model(family, **SIZES), method, budget=BUDGET, every=EVERY)
    cache = new_cache(model)
    rows = [random_ids(length=length, seed=length)[0] for length in PROMPTS[family]]
    ids, mask = left_pad(rows)
    prompt, generator = ids.shape[1], torch.Generator().manual_seed(0)
    padded = not bool(mask.all())
    generated = torch.empty(len(ids), tokens, dtype=torch.long)
    run, logits = Run(ids, mask, cache), []
    seen_mask = torch.cat([mask, mask.new_ones(len(ids), tokens)], dim=1)
    places = (seen_mask.cumsum(-1) - 1).clamp_min(0)
    step = ids
    for count in range(tokens):
        end = prompt + count
        options = (
            {"attention_mask": seen_mask[:, :end], "position_ids": places[:, end - step.shape[1] : end]}
            if padded
            else {}
        )
        last = model(step, past_key_values=cache, **options).logits[:, -1]
        if count < compared:
            logits.append(last)
        step = torch.multinomial(last.softmax(-1), 1, generator=generator)
        generated[:, count : count + 1] = step
        if count % SAMPLED_EVERY == 0:
            run.bytes.append(live_bytes(cache.layers))
            run.most_kept = max(run.most_kept, check_columns(cache, method, end, mask))
    run.tokens, run.logits = torch.cat([ids, generated], dim=1), torch.stack(logits, dim=1)
    return run


def check_columns(cache: KVCache, method: str, processed: int, mask: Tensor) -> int:
    """Raises unless the cache counts every token, and holds each at most once and those that it promised.

    Returns:
        The most tokens held by a KV head, the mean over the heads of its layer.
    """
    sinks, window = METHODS[method]
    if cache.get_seq_length() != processed:
        raise AssertionError(f"{method}: {cache.get_seq_length()} tokens seen, expected {processed}")
    most = 0
    for row in range(len(mask)):
        first = int((mask[row] == 0).sum())
        for layer, heads in enumerate(kept_positions(cache, row)):
            most = max(most, sum(len(columns) for columns in heads) // len(heads))
            for head, columns in enumerate(heads):
                found = columns.tolist()
                own = range(first, processed)
                promised = {*own[:sinks], *own[max(len(own) - window, 0) :]}
                if sorted(set(found)) != found or not set(found) <= set(own) or not promised <= set(found):
                    raise AssertionError(
                        f"{method}: row {row}, layer {layer}, head {head}: expected ascending columns within {own} "
                        f"with {sinks} first and {window} last; missing {sorted(promised - set(found))}, "
                        f"not within {sorted(set(found) - set(own))}, of {len(found)} columns"
                    )
    if most > BUDGET + EVERY:
        raise AssertionError(f"{method}: {most} tokens held a head, expected at most {BUDGET} + {EVERY}")
    return most


class PlainLoop:
    """An unpatched model that attends to lists of columns.

    Args:
        family: of the tiny model.
        method: "streamingllm" or "tova".
    """

    def __init__(self, family: str, method: str) -> None:
        self.model = tiny_model(family, **SIZES)
        self.method = method
        self.columns: list[list[int]] = [[] for _ in range(self.model.config.num_hidden_layers)]
        self.last_weights: list[Tensor] = [torch.empty(0)] * len(self.columns)
        AttentionInterface.register("plain_loop", self.attention)
        AttentionMaskInterface.register("plain_loop", sdpa_mask)
        self.model.set_attn_implementation("plain_loop")

    def attention(self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any):
        """Attention of query `[1, H_q, L, D]` over the listed columns of key and value `[1, H_kv, T, D]`."""
        length, tokens = query.shape[2], key.shape[2]
        columns = self.columns[module.layer_idx]
        columns += range(tokens - length, tokens)
        group = query.shape[1] // key.shape[1]
        held_key, held_value = (t[:, :, columns].repeat_interleave(group, 1) for t in (key, value))
        scores = query @ held_key.mT * scaling
        future = torch.tensor(columns)[None] > torch.arange(tokens - length, tokens)[:, None]
        weights = scores.masked_fill(future, -torch.inf).softmax(-1)
        self.last_weights[module.layer_idx] = weights[0, :, -1].mean(0)
        return (weights @ held_value).transpose(1, 2), None

    def evict(self) -> None:
        """Drops columns of every layer down to the budget."""
        for layer, columns in enumerate(self.columns):
            if len(columns) <= BUDGET:
                continue
            if self.method == "streamingllm":
                self.columns[layer] = columns[:4] + columns[4 - BUDGET :]
            else:
                weights = self.last_weights[layer].tolist()
                best = sorted(range(len(columns)), key=weights.__getitem__, reverse=True)[:BUDGET]
                self.columns[layer] = [columns[place] for place in sorted(best)]

    @torch.no_grad()
    def logits(self, ids: Tensor, prompt: int) -> Tensor:
        """Logits `[n, vocabulary]` from the last token of the prompt to the last but one of `ids` `[1, T]`."""
        cache = DynamicCache(config=self.model.config)
        found = [self.model(ids[:, :prompt], past_key_values=cache).logits[0, -1]]
        self.evict()
        for count, column in enumerate(range(prompt, ids.shape[1] - 1), start=1):
            found.append(self.model(ids[:, column : column + 1], past_key_values=cache).logits[0, -1])
            if count % EVERY == 0:
                self.evict()
        return torch.stack(found)


def difference(run: Run, family: str, method: str) -> float:
    """The largest difference between the logits of a run and those of `PlainLoop`, row by row, without padding."""
    prompt, compared = run.mask.shape[1], run.logits.shape[1]
    largest = 0.0
    for row, own in enumerate(run.mask.bool()):
        real = torch.cat([own, torch.ones(compared, dtype=torch.bool)])
        ids = run.tokens[row : row + 1, : prompt + compared][:, real]
        plain = PlainLoop(family, method).logits(ids, int(own.sum()))
        largest = max(largest, float((plain - run.logits[row]).abs().max()))
    return largest


def block_bytes(cache: KVCache) -> int:
    """Bytes of the dense keys and values of `EVERY` tokens."""
    total = 0
    for layer in cache.layers:
        heads, dim, itemsize = layer.entry
        total += 2 * cache.batch_size * heads * dim * itemsize * EVERY
    return total


def eviction(tokens: dict[str, int], compared: int) -> list[dict[str, Any]]:
    """One row for every family and method."""
    rows = []
    for family, count in tokens.items():
        for method in METHODS:
            run = generate(family, method, count, compared)
            half = len(run.bytes) // 2
            first, second, block = max(run.bytes[:half]), max(run.bytes[half:]), block_bytes(run.cache)
            plain = difference(run, family, method) if method in ("streamingllm", "tova") else None
            rows.append(
                {
                    "method": method,
                    "family": family,
                    "rows": len(run.tokens),
                    "generated": count,
                    "seen": run.cache.get_seq_length(),
                    "most_kept_a_head": run.most_kept,
                    "bytes_first_half": first,
                    "bytes_second_half": second,
                    "block_bytes": block,
                    "flat": second <= first + block,
                    "compared_with_plain_loop": compared if plain is not None else None,
                    "largest_logit_difference": plain,
                    "largest_logit": float(run.logits.abs().max()),
                }
            )
            print(rows[-1], flush=True)
    return rows


# what follows is about codecs

BLOCK = 128
WIDE = {"num_hidden_layers": 2, "head_dim": 64}


class Tap:
    """Remembers the keys and values that the layers of a cache are given, `[H_kv, T, D]` by layer."""

    def __init__(self, cache: KVCache) -> None:
        self.given: list[list[tuple[Tensor, Tensor]]] = [[] for _ in cache.layers]
        for layer, given in zip(cache.layers, self.given, strict=True):
            layer.update = self._tapped(layer.update, given)

    @staticmethod
    def _tapped(update: Callable[..., Any], given: list[tuple[Tensor, Tensor]]) -> Callable[..., Any]:
        def tapped(key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
            given.append((key[0].clone(), value[0].clone()))
            return update(key, value, *args, **kwargs)

        return tapped

    def joined(self) -> list[tuple[Tensor, ...]]:
        """All that was given so far."""
        return [tuple(torch.cat(tensors, dim=1) for tensors in zip(*given, strict=True)) for given in self.given]


@torch.no_grad()
def forced(method: str | None, ids: Tensor, marks: list[int], **options: Any) -> Iterator[tuple[int, KVCache, Tap]]:
    """Reads `ids` `[1, T]`, one prompt of `BLOCK` tokens and then token by token; yields the cache at every mark."""
    model = patch_model(tiny_model("llama", **WIDE), method, **options)
    cache = new_cache(model)
    tap = Tap(cache)
    model(ids[:, :BLOCK], past_key_values=cache)
    for end in range(BLOCK + 1, ids.shape[1] + 1):
        model(ids[:, end - 1 : end], past_key_values=cache)
        if end in marks:
            yield end, cache, tap


def held(cache: KVCache) -> list[tuple[Tensor, ...]]:
    """By layer the keys and values `[H_kv, T, D]` held, decoded, in the order of the sequence."""
    found = []
    for layer in cache.layers:
        parts = [(layer.tail.key[0], layer.tail.value[0])] if layer.tail.length else []
        for segment in reversed(layer.segments):
            heads = segment.dense()[0]
            parts.insert(0, (torch.stack([key for key, _ in heads]), torch.stack([value for _, value in heads])))
        found.append(tuple(torch.cat(tensors, dim=1) for tensors in zip(*parts, strict=True)))
    return found


def encoded_anew(key: Tensor, value: Tensor, codec: Codec) -> tuple[Tensor, Tensor]:
    """What is left of key and value `[H_kv, T, D]` when the whole history is encoded anew at every flush.

    So does transformers' `QuantizedLayer.update`: whenever its dense residue is full, it decodes all that it has
    encoded, appends the residue and encodes the whole, old tokens included. A token that came k flushes ago has been
    rounded k times.
    """
    heads, tokens, dim = key.shape
    found = key[:, :0], value[:, :0]
    for end in range(BLOCK, tokens + 1, BLOCK):
        parts = zip(found, (key, value), strict=True)
        whole = [torch.cat([old, new[:, old.shape[1] : end]], dim=1).reshape(-1, dim) for old, new in parts]
        owners = torch.arange(heads).repeat_interleave(end)
        decoded = codec.decode(codec.encode(*whole, owners), owners)
        found = decoded[0].view(heads, end, dim), decoded[1].view(heads, end, dim)
    rest = found[0].shape[1]
    return torch.cat([found[0], key[:, rest:]], dim=1), torch.cat([found[1], value[:, rest:]], dim=1)


def quartile_errors(actual: Tensor, true: Tensor, sealed: int) -> list[float]:
    """The error relative to the size of `true` `[H_kv, T, D]`, of the oldest quarter of the sealed tokens first."""
    bounds = torch.linspace(0, sealed, 5).long().tolist()
    return [
        rms(actual[:, start:end] - true[:, start:end]) / rms(true[:, start:end])
        for start, end in itertools.pairwise(bounds)
    ]


def codec_rows(tokens: int) -> list[dict[str, Any]]:
    """Errors by age: of the cache at four moments, then of histories that are encoded anew at every flush."""
    ids = random_ids(length=tokens)
    marks = [tokens * quarter // 4 for quarter in (1, 2, 3, 4)]
    dense = next(tap.joined() for _, _, tap in forced(None, ids, [tokens]))
    rows: list[dict[str, Any]] = []

    def add(name: str, against: str, end: int, layer: int, actual, exact, unchanged: bool | None = None) -> None:
        sealed = end // BLOCK * BLOCK
        for kind, mine, true in zip(("key", "value"), actual, exact, strict=True):
            errors = quartile_errors(mine, true, sealed)
            row = {"cache": name, "against": against, "tokens": end, "flushes": sealed // BLOCK}
            row |= {"layer": layer, "of": kind}
            row |= {f"error_{age}": error for age, error in zip(("oldest", "older", "newer", "newest"), errors)}
            rows.append(row | {"first_tokens_unchanged": unchanged})

    first: list[tuple[Tensor, ...]] = []
    for end, cache, tap in forced("turboquant", ids, marks, bits=4, block_size=BLOCK):
        now = held(cache)
        oldest = [tuple(tensor[:, : marks[0] // 2].clone() for tensor in pair) for pair in now]
        first = first or oldest
        for layer, (actual, given) in enumerate(zip(now, tap.joined(), strict=True)):
            same = all(torch.equal(a, b) for a, b in zip(first[layer], oldest[layer], strict=True))
            add("turboquant, each block once", "what it was given", end, layer, actual, given, same)
            add("turboquant, each block once", "the dense cache", end, layer, actual, dense[layer], same)
    codecs: dict[str, Codec] = {
        "turboquant, all anew at every flush": TurboQuantCodec(),
        "grid of each token, all anew at every flush": UniformCodec(key_axis="token"),
        "keys on a grid of each channel, all anew at every flush": UniformCodec(),
    }
    for name, codec in codecs.items():
        for end in (marks[0], marks[-1]):
            for layer, pair in enumerate(dense):
                actual = encoded_anew(*(tensor[:, :end] for tensor in pair), codec)
                add(name, "what it was given", end, layer, actual, [tensor[:, :end] for tensor in pair])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("eviction", "turboquant"))
    parser.add_argument("--tokens", type=int, help="default 20,000 (an eighth of it for the batch), or 10,000")
    parser.add_argument("--compared", type=int, default=1000, help="tokens computed again by the plain loop")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.part == "eviction":
        tokens = options.tokens or 20_000
        write_results("long_generation_eviction", eviction({"llama": tokens, "qwen3": tokens // 8}, options.compared))
    else:
        write_results("long_generation_turboquant", codec_rows(options.tokens or 10_000))


if __name__ == "__main__":
    main()
