"""A model's fingerprint: what a saved plan or cache is checked against before it is used."""

from __future__ import annotations

import hashlib
import json
import re

import torch

# the parts of a configuration that change what a cached key or value means
FIELDS = (
    "model_type",
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "rope_theta",
    "rope_parameters",
    "sliding_window",
    "layer_types",
)
SAMPLED_ROWS = 64
# whole numbers by their bytes, the widest first
WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}
# the parts of a configuration that change no key and no value while generating; names with an underscore are private
ASIDE = {
    "architectures",
    "dtype",
    "id2label",
    "initializer_range",
    "label2id",
    "problem_type",
    "return_dict",
    "transformers_version",
    "use_cache",
}
ASIDE_FORMS = re.compile(r"_.*|output_.*|.*_token_id")


def fingerprint(model: torch.nn.Module) -> str:
    """Returns `"<architecture>-<weights>"`, each 16 hexadecimal digits.

    The second part hashes a sample of the input embedding rounded to bfloat16, so that a model loaded in another dtype
    keeps its fingerprint. It is `"unknown"` where the weights are not in memory.
    """
    config = model.config.to_dict()
    text = json.dumps({name: config.get(name) for name in FIELDS}, sort_keys=True, default=str)
    weight = model.get_input_embeddings().weight
    if weight.device.type == "meta" or not weight.is_floating_point():
        return f"{_digest(text.encode())}-unknown"
    # of a tensor parallel model every process holds a part
    gather = getattr(weight, "full_tensor", None)
    weight = weight if gather is None else gather()
    rows = torch.linspace(0, weight.shape[0] - 1, SAMPLED_ROWS).long()
    sample = weight.detach()[rows.to(weight.device)].to("cpu", torch.bfloat16).contiguous()
    return f"{_digest(text.encode())}-{_digest(sample.view(torch.int16).numpy().tobytes())}"


def model_digest(decoder: torch.nn.Module) -> str:
    """Hashes what turns tokens into keys and values, settings and weights: 64 hexadecimal digits.

    The whole configuration but what cannot matter, since a family may have settings that nobody here has heard of:
    two models of the same weights differ in how many experts they ask or how they scale a residual.
    """
    config = decoder.config.to_dict()
    chosen = {name: config[name] for name in config.keys() - ASIDE if not ASIDE_FORMS.fullmatch(name)}
    settings = json.dumps(chosen, sort_keys=True, default=str)
    return hashlib.sha256(f"{settings} {weights_digest(decoder)}".encode()).hexdigest()


def weights_digest(module: torch.nn.Module) -> str:
    """Hashes a sample of every parameter and buffer, and which adapters are in force: 64 hexadecimal digits.

    Unlike the fingerprint it differs between a model and its fine-tuned or adapted version, in other dtypes, and after
    every training step. A step changes all of a matrix, of which a sample is enough, but of an embedding the rows of
    its tokens only, so embeddings are read whole. A change of single numbers by hand can escape it elsewhere. It takes
    less than a forward of one token, which reads all weights, and is taken anew for every prompt: nothing cheaper
    notices what is written through `Parameter.data`.
    """
    digest = hashlib.sha256()
    samples: dict[torch.device, list[torch.Tensor]] = {}
    tables = _tables(module)
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        if tensor.device.type != "meta" and tensor.numel():
            whole = tensor.dim() > 1 and name.startswith(tables)
            sample = row_sums(tensor.detach()) if whole else _sample(tensor.detach())
            samples.setdefault(tensor.device, []).append(sample.view(torch.uint8))
    for own in samples.values():
        digest.update(torch.cat(own).cpu().numpy().tobytes())
    digest.update(_adapters(module).encode())
    return digest.hexdigest()


def row_sums(table: torch.Tensor) -> torch.Tensor:
    """For every row of a tensor a whole number that any change of one of its words changes, and of several all but
    surely: the sum of the words, each times an odd number, modulo 2^64."""
    rows = table.contiguous().view(len(table), -1).view(torch.uint8)
    width = next(size for size in WORDS if rows.shape[1] % size == rows.storage_offset() % size == 0)
    words = rows.view(WORDS[width])
    # the golden ratio's digits, as in Fibonacci hashing
    factors = torch.arange(words.shape[1], device=words.device) * -0x61C8864680B583EB | 1
    # products of a few rows at a time stay in the cache of a processor, of many in the memory of a device
    at_once = max((1 << (16 if words.device.type == "cpu" else 24)) // words.shape[1], 1)
    return torch.cat([(block * factors).sum(1) for block in words.split(at_once)])


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    """Numbers from all over a tensor."""
    count = min(tensor.numel(), SAMPLED_ROWS)
    # in whole numbers: those of float32 pass the end of a large tensor
    places = torch.arange(count, device=tensor.device) * (tensor.numel() - 1) // max(count - 1, 1)
    return torch.take(tensor, places)


def _tables(module: torch.nn.Module) -> tuple[str, ...]:
    """How the names of parameters of embeddings begin, adapters of them included."""
    parts = ((name, getattr(part, "base_layer", part)) for name, part in module.named_modules())
    return tuple(f"{name}." if name else "" for name, part in parts if isinstance(part, torch.nn.Embedding))


def _adapters(module: torch.nn.Module) -> str:
    """Which adapters of PEFT are in force, everywhere in a model; not those that rows of a batch choose by name."""
    names = ("active_adapters", "disable_adapters", "merged_adapters", "scaling")
    # of a layer it is a property, while transformers gives every model a method of this name
    layers = (part for part in module.modules() if isinstance(getattr(part, "disable_adapters", None), bool))
    return repr([[getattr(layer, name, None) for name in names] for layer in layers])


def matches(one: str, other: str) -> bool:
    """Whether two fingerprints can be of one model; an empty one matches any."""
    if not one or not other:
        return True
    architecture, weights = one.split("-")
    other_architecture, other_weights = other.split("-")
    return architecture == other_architecture and (weights == other_weights or "unknown" in (weights, other_weights))


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
