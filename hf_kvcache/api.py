"""The functions that users call. The only module, with the command line, that sees methods and patches at once."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from hf_kvcache.cache import KVCache
from hf_kvcache.calibration.probe import ModelProbe
from hf_kvcache.codecs.codec import PickyCodec
from hf_kvcache.eviction import HeadImportance
from hf_kvcache.fingerprint import fingerprint, matches
from hf_kvcache.methods import KVSharer, Method, Yoco, headkv
from hf_kvcache.patches.adapter import Adapter, home
from hf_kvcache.patches.adapters import find_adapter
from hf_kvcache.patches.attach import attach, attached, detach, require_attached
from hf_kvcache.patches.compat import sliding_windows
from hf_kvcache.patches.compiled import CompiledDecode
from hf_kvcache.patches.early_exit import POSITIONS
from hf_kvcache.persistence import restore_cache
from hf_kvcache.resolve import resolve
from hf_kvcache.sharing import SharingPlan
from hf_kvcache.spec import CacheSpec

logger = logging.getLogger(__name__)

ModelT = TypeVar("ModelT", bound=nn.Module)


def patch_model(
    model: ModelT, method: str | Method | Sequence[str | Method] | None = None, *, tokenizer: Any = None, **options: Any
) -> ModelT:
    """Gives a transformers model, in place, a compressed KV cache. Everything else about it stays as it is.

    Args:
        model: a decoder-only model of a supported family, or a PEFT model around one. Only this instance changes.
        method: names joined by `+`, a `Method`, a list of either, or None (also `"none"`) for our cache with nothing
            lost. A patched model is unpatched first, but a plan that is part of the model (yoco, yoco++) stays until
            `unpatch_model`.
        tokenizer: for methods that calibrate on text; None to look for one at the place the model was loaded from.
        options: flat options of the named methods, e.g. `share=0.25`.

    Returns:
        The same model.

    Raises:
        ValueError: for an unknown method or option, or a plan that does not fit.
        NotImplementedError: for a model that is not supported; the text says what is missing. On any error the model
            is left as it was.

    Example:
        >>> patch_model(model, method="kvsharer", share=0.25)
        >>> model.generate(**inputs)
    """
    target = base_model(model)
    methods = resolve(method, options)
    old = detach(target)
    try:
        # fits need gradients, which tensors made in inference mode cannot have
        with torch.inference_mode(False):
            probe = make_probe(target, tokenizer)
            spec = reduce(lambda spec, method: method.apply(spec, probe), methods, probe.full)
            if old is not None and old.spec.sharing.part_of_model and "sharing" not in spec.filled_by:
                spec = spec.fill("sharing", old.spec.sharing, old.spec.filled_by["sharing"])
        check_fit(spec)
        check_codecs(target, probe.adapter, spec)
        check_processes(target, spec)
        for doubt in spec.doubts():
            warnings.warn(doubt, UserWarning, stacklevel=2)
        attach(target, probe.adapter, spec, old)
    except BaseException:
        if old is not None:
            attach(target, old.adapter, old.spec, old)
            if old.compiled is not None:
                compile_decode(target)
        raise
    return model


def find_plan(model: nn.Module, method: KVSharer, *, tokenizer: Any = None) -> SharingPlan:
    """Runs a sharing method's search on an unpatched model and returns the plan, to save or to patch with.

    Example:
        >>> plan = find_plan(model, KVSharer(share=0.25), tokenizer=tokenizer)
        >>> plan.save("plan.safetensors")
        >>> patch_model(model, "kvsharer", plan="plan.safetensors")
    """
    return find_plans(model, [method], tokenizer=tokenizer)[0]


def find_plans(model: nn.Module, methods: Sequence[KVSharer], *, tokenizer: Any = None) -> list[SharingPlan]:
    """`find_plan` for several settings at once; what their searches have in common is measured once."""
    target = base_model(model)
    require_unpatched(target, "a plan is searched on the untouched model")
    warn_of_half_precision(target)
    with torch.inference_mode(False):
        probe = make_probe(target, tokenizer)
        return [method.find_plan(probe) for method in methods]


def measure_heads(
    model: nn.Module, *, samples: int = headkv.SAMPLES, length: int = headkv.LENGTH, tokenizer: Any = None
) -> HeadImportance:
    """Measures on an unpatched model how much every head matters for retrieval, to save or to patch with.

    Args:
        model: an unpatched model that can answer a question about a text.
        samples: number of questions.
        length: tokens of each text.
        tokenizer: None to look for one at the place the model was loaded from.

    Example:
        >>> measure_heads(model, tokenizer=tokenizer).save("heads.safetensors")
        >>> patch_model(model, "headkv", importance="heads.safetensors")
    """
    target = base_model(model)
    require_unpatched(target, "heads are measured on the untouched model")
    warn_of_half_precision(target)
    for name, count in (("samples", samples), ("length", length)):
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"{name} must be a positive int, got {count!r}")
    with torch.inference_mode(False):
        return make_probe(target, tokenizer).head_importance(samples, length)


def unpatched_fingerprint(model: nn.Module) -> str:
    """The fingerprint of a supported model that is not patched; raises for any other."""
    target = base_model(model)
    find_adapter(target)
    require_weights(target)
    require_unpatched(target, "a plan is measured on the untouched model")
    return fingerprint(target)


def warn_of_half_precision(model: nn.Module) -> None:
    """Says that a measurement on this model hides small differences, where its weights have 16 bits."""
    dtypes = {parameter.dtype for parameter in model.parameters()} & {torch.float16, torch.bfloat16}
    if dtypes:
        logger.warning(
            "this measures a model in %s, whose rounding hides what is gentler than 4 bits; load it in float32",
            " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes)),
        )


def unpatch_model(model: ModelT) -> ModelT:
    """Makes a patched model what it was before; does nothing to any other. Returns the same model."""
    detach(base_model(model))
    return model


def compile_decode(model: ModelT) -> ModelT:
    """Makes a patched model decode in steps of a fixed shape, which a GPU replays as CUDA graphs, without launch gaps.

    Everything that brings one token to a filled cache is such a step: `generate`, sampling included, and plain
    forwards. Prompts, the flushes of a codec, beams and forwards that ask for more than logits run as before. On a CPU
    nothing is recorded, and the steps are computed one by one. `unpatch_model` and another `patch_model` undo it.

    Args:
        model: a patched model, on one device.

    Returns:
        The same model.

    Raises:
        ValueError: when the model is not patched.
        NotImplementedError: where steps cannot have a fixed shape: sliding windows, states, eviction while decoding,
            offloaded caches, stores of prompts.

    Example:
        >>> compile_decode(patch_model(model, "adakv+turboquant"))
        >>> model.generate(**inputs, max_new_tokens=500)
    """
    target = base_model(model)
    attachment = require_attached(target)
    if attachment.compiled is None:
        attachment.compiled = CompiledDecode(target, attachment.spec)
    return model


def new_cache(model: nn.Module) -> KVCache:
    """An empty cache for a patched model, to pass as `past_key_values`."""
    return KVCache(require_attached(base_model(model)).spec)


@torch.no_grad()
def compress(model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None, *, chunk: int = 0) -> KVCache:
    """Reads a context once and returns its compressed cache, to be asked many questions.

    Copies of the cache share what is sealed, so ten questions do not hold ten caches. What is asked is never evicted,
    unless `every` says so.

    Args:
        model: a patched model.
        input_ids: the context `[B, T]`.
        attention_mask: `[B, T]`, 0 for padding; None when there is none.
        chunk: tokens read in one forward, which bounds the memory of activations; 0 to read all at once.

    Example:
        >>> patch_model(model, "kvzip", budget=0.25)
        >>> cache = compress(model, context_ids)
        >>> for question_ids in questions:
        ...     ids = torch.cat([context_ids, question_ids], dim=1)
        ...     model.generate(ids, past_key_values=copy.deepcopy(cache))
    """
    if not isinstance(input_ids, Tensor):
        raise TypeError(
            f"input_ids must be a tensor [B, T], got {type(input_ids).__name__}; a tokenizer makes one: "
            'compress(model, **tokenizer(text, return_tensors="pt"))'
        )
    if input_ids.dim() != 2 or not input_ids.shape[1]:
        raise ValueError(f"input_ids must be [B, T] with T >= 1, got shape {tuple(input_ids.shape)}")
    if chunk < 0:
        raise ValueError(f"chunk is a number of tokens, or 0 for all at once, got {chunk}")
    target = base_model(model)
    cache, decoder = new_cache(target), require_attached(target).adapter.find_decoder(target)
    length = input_ids.shape[1]
    cache.expect(length)
    positions = None if attention_mask is None else (attention_mask.long().cumsum(-1) - 1).clamp_min(0)
    # nobody asks for hidden states here, so that layers without KV of their own have next to nothing to do
    few = {POSITIONS: 1} if cache.spec.sharing.early_exit else {}
    for start in range(0, length, chunk or length):
        end = min(start + (chunk or length), length)
        decoder(
            input_ids=input_ids[:, start:end],
            attention_mask=None if attention_mask is None else attention_mask[:, :end],
            position_ids=None if positions is None else positions[:, start:end],
            past_key_values=cache,
            use_cache=True,
            **few,
        )
    return cache


def load_cache(model: nn.Module, path: str | Path) -> KVCache:
    """Reads a cache that `KVCache.save` wrote, for a model patched as the one that made it.

    Raises:
        ValueError: for a file that is truncated, foreign, of another model or of another sharing plan.
    """
    target = base_model(model)
    cache, adapter = new_cache(target), require_attached(target).adapter
    devices = [
        home(adapter.find_attention(target, layer)) or torch.device("cpu") for layer in range(cache.spec.num_layers)
    ]
    return restore_cache(cache, path, devices, target.dtype)


def is_patched(model: nn.Module) -> bool:
    """Whether `patch_model` is in force on this model."""
    return attached(base_model(model)) is not None


def require_unpatched(model: nn.Module, why: str) -> None:
    """Raises for a patched model, and says why."""
    if attached(model) is not None:
        raise ValueError(f"{why}, and this one is patched; call unpatch_model first")


def attach_plan(model: nn.Module, plan: SharingPlan) -> None:
    """Attaches a plan that is part of the model to an unpatched one, as the method that made it does."""
    probe = make_probe(model, None)
    spec = probe.full.fill("sharing", plan, by=plan.settings.get("method", "yoco"))
    check_fit(spec)
    attach(model, probe.adapter, spec)


def convert(model: ModelT, method: str | Yoco = "yoco++", **options: Any) -> ModelT:
    """Converts a pretrained model to YOCO or YOCO++; `hf_kvcache.models.convert` has the arguments."""
    from hf_kvcache.models.convert import convert

    return convert(model, method, **options)


def require_weights(model: nn.Module) -> None:
    """Raises for a model whose weights were never loaded; dispatched ones may rest on the meta device."""
    dispatched = any(hasattr(module, "_hf_hook") for module in model.modules())
    if not dispatched and any(weight.device.type == "meta" for weight in model.parameters()):
        raise ValueError(
            f"{type(model).__name__} has parameters on the meta device, expected loaded weights; load them first"
        )


def check_fit(spec: CacheSpec) -> None:
    """Raises when a plan in the spec was made for another model."""
    spec.check()
    if not matches(spec.sharing.fingerprint, spec.fingerprint):
        raise ValueError(
            f"the sharing plan was made for the model {spec.sharing.fingerprint}, this one is {spec.fingerprint}; "
            "calibrate a plan for this model"
        )


def check_codecs(model: nn.Module, adapter: Adapter, spec: CacheSpec) -> None:
    """Raises when keys and values of the model are no entries for the codecs of their layers."""
    for layer in spec.evicting:
        codec, dim = spec.codecs[layer], getattr(adapter.find_attention(model, layer), "head_dim", None)
        if isinstance(codec, PickyCodec) and dim is not None:
            codec.check_fit(dim)


def check_processes(model: nn.Module, spec: CacheSpec) -> None:
    """Raises for what processes that share a tensor parallel model would decide each by itself, and differently."""
    policy = spec.eviction
    if (getattr(model, "tp_size", None) or 1) == 1:
        return
    if spec.prefix is not None:
        raise NotImplementedError(
            f"{spec.filled_by['prefix']} looks a prompt up in every process by itself, and processes of a tensor "
            "parallel model that find different parts of it would compute different tokens and wait for each other; "
            "use one process, or leave the method out"
        )
    if policy is None:
        return
    roles = (policy.scorer, policy.allocator, policy.selector)
    comparing = [role.name for role in roles if getattr(role, "across_heads", False) or getattr(role, "over_layers", 0)]
    if comparing:
        raise NotImplementedError(
            f"{' and '.join(comparing)} would compare heads, but of a tensor parallel model each process has a part; "
            "expected methods that decide head by head (snapkv, knorm, streamingllm, turboquant ...)"
        )


def make_probe(model: nn.Module, tokenizer: Any) -> ModelProbe:
    """What methods may ask of a supported, loaded model."""
    adapter = find_adapter(model)
    require_weights(model)
    full = CacheSpec.full(
        sliding_windows(model), fingerprint(model), adapter.output, adapter.own_sharing(model), adapter.unrotated(model)
    )
    return ModelProbe(model, adapter, full, tokenizer)


def base_model(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT model, or the model itself."""
    get_base_model = getattr(model, "get_base_model", None)
    return get_base_model() if callable(get_base_model) else model
