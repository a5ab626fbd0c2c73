"""What the tests of this library are made of, for the tests of your own methods and model families.

Tiny random models of every supported family, random prompts, a greedy decoder and a few assertions. Nothing is
downloaded.

Example:
    >>> model, ids = tiny_model("llama"), random_ids(batch=2, length=12)
    >>> expected = greedy(model, ids)
    >>> bool((greedy(patch_model(model, method=None), ids) == expected).all())
    True
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from hf_kvcache.api import make_probe
from hf_kvcache.eviction import Observation, Reading
from hf_kvcache.patches.adapters import ADAPTERS

# yoco shares by itself, so not every law and method applies to it
FAMILIES: tuple[str, ...] = tuple(sorted(set(ADAPTERS) - {"yoco"}))

VOCABULARY = 97
PAD = 0
WINDOW = 8

# three query heads read each of two KV heads
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": PAD,
}
_MIXED = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 2}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_OF_FAMILY: dict[str, dict[str, Any]] = {
    "cohere": {"logit_scale": 1.0},
    "cohere2": {"logit_scale": 1.0, **_MIXED},
    "gemma2": {"query_pre_attn_scalar": 8, "attn_logit_softcapping": 5.0, **_MIXED},
    "gemma3_text": {"query_pre_attn_scalar": 8, **_MIXED},
    "granite": {"attention_multiplier": 8**-0.5},
    "ministral": _MIXED,
    "mistral": {"sliding_window": WINDOW},
    "mixtral": {"num_local_experts": 4},
    "olmo3": _MIXED,
    "qwen2_moe": {"shared_expert_intermediate_size": 32, **_EXPERTS},
    "qwen3_moe": _EXPERTS,
    "seed_oss": {"attention_dropout": 0.0, "residual_dropout": 0.0},
}


def tiny_model(family: str, seed: int = 0, **config_overrides: Any) -> PreTrainedModel:
    """Makes a small random causal language model of a family, in float32 and in evaluation mode.

    Its weights are large enough for greedy decoding to wander and for every token to look far back, so that a wrong
    key, position or mask changes the tokens. Two calls with one seed make equal models.

    Args:
        family: a `config.model_type`: one of `FAMILIES`, or one whose configuration takes the usual names.
        seed: of the weights.
        config_overrides: replace fields of the configuration. The default has 4 layers, 6 query heads on 2 KV heads,
            a vocabulary of `VOCABULARY`, no end-of-text token, `PAD` for padding, and, where the family has sliding
            attention, windows of `WINDOW` tokens.

    Returns:
        The model.

    Example:
        >>> tiny_model("gemma2", num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"])
    """
    import hf_kvcache.models  # noqa: F401 - registers our own models

    config = AutoConfig.for_model(family, **{**_SIZES, **_OF_FAMILY.get(family, {}), **config_overrides})
    # before 5.15 transformers gives gemma2 an attention that leaves out its soft cap
    attention = "eager" if getattr(config, "attn_logit_softcapping", None) else None
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention)
    _draw_weights(model, seed)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, PAD
    return model.eval()


@torch.no_grad()
def _draw_weights(model: PreTrainedModel, seed: int) -> None:
    """Draws all weights anew: matrices of unit gain and more, vectors (norms, biases) near where they were."""
    generator = torch.Generator().manual_seed(seed)
    embedding = model.get_input_embeddings().weight
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 1:
            parameter.add_(noise, alpha=0.1)
        elif parameter is embedding:
            # gemma multiplies its embeddings by the root of the width, which would drown all layers
            parameter.copy_(noise / parameter.shape[-1] ** 0.5)
        else:
            gain = 2.0 if any(part in name for part in ("q_proj", "k_proj", "qkv_proj", "lm_head")) else 1.2
            parameter.copy_(noise * gain / parameter.shape[-1] ** 0.5)


def random_ids(batch: int = 1, length: int = 20, seed: int = 0, vocabulary: int = VOCABULARY) -> Tensor:
    """Random token ids `[batch, length]` without the padding token; equal for equal arguments."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randint(PAD + 1, vocabulary, (batch, length), generator=generator)


def random_observation(
    batch: int = 2,
    heads: int = 2,
    group: int = 3,
    tokens: int = 40,
    queries: int = 12,
    dim: int = 8,
    readings: int = 1,
    holes: int = 0,
    seed: int = 0,
    **fields: Any,
) -> Observation:
    """What an eviction method is shown, at random.

    Args:
        batch, heads, group, tokens, queries, dim: B, H_kv, query heads a KV head, T, W and D.
        readings: how many layers read the KV.
        holes: up to so many tokens are missing of every row and head, as after an eviction: what is held lies at the
            end, in the order of the sequence.
        seed: of all numbers.
        fields: further fields of the observation.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    key, value = 1.5 * draw(batch, heads, tokens, dim) + draw(dim), draw(batch, heads, tokens, dim)
    found = []
    for _ in range(readings):
        output = nn.Linear(heads * group * dim, 16, bias=False)
        output.weight.data = draw(*output.weight.shape)
        found.append(Reading(1.5 * draw(batch, heads * group, queries, dim), output))
    if holes:
        missing = torch.randint(0, holes + 1, (batch, heads, 1), generator=generator)
        fields["valid"] = torch.arange(tokens) >= missing
        # a random choice of the places of a sequence that is longer
        seen = tokens + holes
        places = torch.rand(batch, heads, seen, generator=generator).argsort(-1)[..., :tokens].sort(-1).values
        fields |= {"tokens": seen, "positions": places}
    return Observation(key, value, found, dim**-0.5, **fields)


def plain_attention(observed: Observation, row: int, head: int, last: int | None = None) -> list[Tensor]:
    """Attention weights over the tokens held of one KV head, query by query, in float64.

    Returns:
        `[W, T]` for every query head that reads it: layer after layer, head after head.
    """
    key = observed.key[row, head].double()
    valid = torch.ones(len(key), dtype=torch.bool) if observed.valid is None else observed.valid[row, head]
    found = []
    for reading in observed.readings:
        assert reading.query is not None
        queries = reading.query[row].double()
        group = len(queries) // observed.key.shape[1]
        for member in range(head * group, (head + 1) * group):
            rows = []
            for query in range(queries.shape[1])[-(last or queries.shape[1]) :]:
                logits = torch.full((len(key),), -torch.inf, dtype=torch.float64)
                for column in range(len(key) - queries.shape[1] + query + 1):
                    if valid[column]:
                        logits[column] = key[column] @ queries[member, query] * observed.scale
                        if observed.softcap:
                            logits[column] = observed.softcap * torch.tanh(logits[column] / observed.softcap)
                rows.append(logits.softmax(-1))
            found.append(torch.stack(rows))
    return found


def left_pad(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Joins token ids `[T_i]` of different lengths into one batch.

    Returns:
        ids and attention mask `[len(rows), max T_i]`, the padding on the left.
    """
    longest = max(len(row) for row in rows)
    ids = torch.stack([nn.functional.pad(row, (longest - len(row), 0), value=PAD) for row in rows])
    mask = torch.stack([nn.functional.pad(torch.ones_like(row), (longest - len(row), 0)) for row in rows])
    return ids, mask


def greedy(model: PreTrainedModel, ids: Tensor, tokens: int = 12, **kwargs: Any) -> Tensor:
    """The tokens `[B, tokens]` that greedy decoding appends to `ids`; `kwargs` go to `generate`."""
    kwargs = {"attention_mask": torch.ones_like(ids), "do_sample": False, **kwargs}
    out = model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, **kwargs)
    return (out if isinstance(out, Tensor) else out.sequences)[:, ids.shape[1] :]


def greedy_by_forward(model: PreTrainedModel, ids: Tensor, tokens: int = 12, cache: Any = None) -> Tensor:
    """Greedy decoding with plain forwards and no position ids, so that the cache alone says where a token stands."""
    chosen = []
    with torch.no_grad():
        for _ in range(tokens):
            out = model(ids, past_key_values=cache, use_cache=True)
            cache, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
            chosen.append(ids)
    return torch.cat(chosen, dim=1)


def live_tensors(root: Any) -> Iterator[Tensor]:
    """Every tensor that can be reached from an object through attributes, mappings and sequences, each once."""
    seen: set[int] = set()
    pending = [root]
    while pending:
        item = pending.pop()
        if id(item) in seen or isinstance(item, (str, bytes, int, float, type, nn.Module)):
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            # a quantised tensor of another library is a shell around the tensors that hold it
            parts = getattr(item, "__tensor_flatten__", None)
            if parts is None:
                yield item
            else:
                pending += [getattr(item, name) for name in parts()[0]]
        elif isinstance(item, Mapping):
            pending += item.values()
        elif isinstance(item, (Sequence, Set)):
            pending += item
        else:
            pending += getattr(item, "__dict__", {}).values()


def live_bytes(root: Any) -> int:
    """Bytes of the distinct storages behind `live_tensors(root)`: what the object really keeps in memory.

    Scalars do not count: transformers' sliding layers hold the size of their window as one.
    """
    storages = [tensor.untyped_storage() for tensor in live_tensors(root) if tensor.dim()]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def rms(tensor: Tensor) -> float:
    """The root of the mean square, in float64."""
    return float(tensor.double().square().mean().sqrt())


def assert_close(name: str, actual: Tensor, exact: Tensor, reference: Tensor, factor: float = 2.0) -> None:
    """Asserts that `actual` is about as near to the truth as an honest computation in the same precision.

    Args:
        name: what is compared, for the message.
        actual: the result to judge.
        exact: the same computed in float64.
        reference: the same computed plainly in the precision of `actual`.
        factor: how many times the error of `reference` is allowed, on top of a rounding of the result itself.

    Raises:
        AssertionError: with all errors relative to the size of `exact`.
    """
    assert actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    assert bool(torch.isfinite(actual).all()), f"{name}: {int((~torch.isfinite(actual)).sum())} values are not finite"
    size = rms(exact) or 1.0
    error = rms(actual.double() - exact) / size
    # a rounding of the result, and what float64 itself does not know
    floor = torch.finfo(actual.dtype).eps + 64 * torch.finfo(torch.float64).eps
    honest = rms(reference.double() - exact) / size
    allowed = factor * honest + floor
    assert error <= allowed, (
        f"{name}: relative error {error:.3g} exceeds {allowed:.3g}, "
        f"which is {factor} x {honest:.3g} of the reference + {floor:.1g}"
    )


@dataclass(frozen=True)
class ModelState:
    """What `unpatch_model` must bring back: see `model_state`."""

    attributes: dict[str, frozenset[str]]
    objects: dict[str, int]
    weights: dict[str, Tensor]
    trainable: frozenset[str]
    configs: dict[str, dict[str, Any]]
    logits: Tensor

    def assert_equal(self, other: ModelState) -> None:
        """Raises an AssertionError that names what differs."""
        for name, mine in (("attributes", self.attributes), ("objects", self.objects), ("configs", self.configs)):
            theirs = getattr(other, name)
            differ = {key for key in {*mine, *theirs} if mine.get(key) != theirs.get(key)}
            details = {key: (mine.get(key), theirs.get(key)) for key in sorted(differ)[:3]}
            assert not differ, f"{name} changed (before, after): {details}"
        assert list(self.weights) == list(other.weights), "the names in the state dict changed"
        for name, weight in self.weights.items():
            assert torch.equal(weight, other.weights[name]), f"{name} in the state dict changed"
        assert self.trainable == other.trainable, f"requires_grad changed: {self.trainable ^ other.trainable}"
        assert torch.equal(self.logits, other.logits), "the logits changed"


@torch.no_grad()
def model_state(model: PreTrainedModel) -> ModelState:
    """Records a model: attributes, hooks, submodules and configurations by identity, weights, gradients, outputs."""
    modules = dict(model.named_modules())
    objects = {f"{name}.config": id(module.config) for name, module in modules.items() if "config" in module.__dict__}
    objects |= {f"module {name}": id(module) for name, module in modules.items()}
    objects |= {f"parameter {name}": id(parameter) for name, parameter in model.named_parameters()}
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    attributes = {name: frozenset(module.__dict__) for name, module in modules.items()}
    attributes |= {
        f"{name}.{kind}": frozenset(str(key) for key in module.__dict__[kind])
        for name, module in modules.items()
        for kind in hooks
    }
    return ModelState(
        attributes,
        objects,
        {name: weight.clone() for name, weight in model.state_dict().items()},
        frozenset(name for name, parameter in model.named_parameters() if parameter.requires_grad),
        {name: module.config.to_dict() for name, module in modules.items() if "config" in module.__dict__},
        _logits(model, random_ids(batch=2, length=12)),
    )


def _logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    out = model(ids, use_cache=False)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def sharing_maps(model: PreTrainedModel) -> dict[str, list[tuple[int, int]]]:
    """(consumer, source) pairs of layers of an unpatched model that can share, by a name for each set.

    Only layers of one kind share; `several` has one producer with as many consumers as there can be.
    """
    kinds = make_probe(model, None).kinds
    pairs = [
        (consumer, source) for consumer, kind in enumerate(kinds) for source in range(consumer) if kinds[source] == kind
    ]
    nearest = max(pairs, key=lambda pair: pair[1] - pair[0])
    farthest = max(pairs, key=lambda pair: (pair[0] - pair[1], pair[0]))
    readers: dict[int, list[int]] = {}
    for consumer, source in pairs:
        readers.setdefault(source, []).append(consumer)
    busiest = max(readers, key=lambda source: len(readers[source]))
    return {
        "adjacent": [nearest],
        "distant": [farthest],
        "several": [(consumer, busiest) for consumer in readers[busiest]],
    }
