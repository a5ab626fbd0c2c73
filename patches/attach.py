"""Attaching a cache to one model instance, and taking it off again.

Four interceptions, all on the instance, all undone by `detach`: the attention function, the method with which
`generate` makes a cache, a hook before the decoder's forward, and the projections that consumers do not need.
No forward is copied and nothing global changes, but for the names under which our attention functions are registered.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from hf_kvcache.attention import ResidualContext, SharingContext, register
from hf_kvcache.cache import KVCache
from hf_kvcache.deferred import settle
from hf_kvcache.fingerprint import matches
from hf_kvcache.patches import early_exit, residual
from hf_kvcache.patches.adapter import Adapter, Substitute
from hf_kvcache.patches.compat import reentrant_checkpointing
from hf_kvcache.patches.compiled import CompiledDecode
from hf_kvcache.patches.configuration import carry_over, swap_config
from hf_kvcache.patches.prefix import adopt_prefix, store_prefix
from hf_kvcache.patches.projections import heal_projections, skip_projections
from hf_kvcache.patches.saving import save_pretrained, upload
from hf_kvcache.spec import CacheSpec

ATTRIBUTE = "_hf_kvcache"
# of the model, for which the patch puts its own on the instance
METHODS = ("_prepare_cache_for_generation", "save_pretrained", "_upload_modified_files")

# values of cache_implementation that ask for nothing we lack: published configurations of models with sliding layers
# carry "hybrid", and transformers 5.14 sets "dynamic_full" itself for assisted decoding
UNDEMANDING = (None, "dynamic", "dynamic_full", "hybrid")


@dataclass
class Attachment:
    """What is attached to a model, and what has to be put back.

    Args:
        adapter: of the model's family.
        spec: of the caches that the model makes.
        name: of our attention function.
        config: the model's own copy of its configuration, made for the time of the patch.
        original_config: the one before, which other models may share.
        originals: replaced modules, as (parent, attribute, original module).
        frozen: parameters that no forward uses while the patch lasts and that were trainable before.
        residuals: trainable weights that the plan adds to the model, by layer.
        compiled: what takes the place of the model's forward while decoding, where that was asked for.
        first_config: a copy of `config` as the patch left it, to tell what was changed since.
        own_methods: of `METHODS`, what the user had put on the instance before.
    """

    adapter: Adapter
    spec: CacheSpec
    name: str
    config: Any
    original_config: Any
    originals: list[tuple[nn.Module, str, nn.Module]] = field(default_factory=list)
    frozen: list[nn.Parameter] = field(default_factory=list)
    residuals: dict[int, residual.KVResidual] = field(default_factory=dict)
    compiled: CompiledDecode | None = None
    first_config: Any = None
    own_methods: dict[str, Any] = field(default_factory=dict)

    def install(self, model: nn.Module, decoder: nn.Module, substitutes: list[tuple[nn.Module, str, Substitute]]):
        """Does all that `restore` undoes."""
        self.own_methods = {name: model.__dict__[name] for name in METHODS if name in model.__dict__}
        swap_config(model, self.original_config, self.config)
        model.set_attn_implementation(self.name)
        if self.config._attn_implementation != self.name:
            raise NotImplementedError(
                f"{type(model).__name__} does not take its attention from transformers' AttentionInterface, "
                "so its cache cannot be replaced"
            )
        self.first_config = copy.deepcopy(self.config)
        for parent, attribute, substitute in substitutes:
            self.originals.append((parent, attribute, substitute.original))
            setattr(parent, attribute, substitute)
        idle = [parameter for _, _, substitute in substitutes for parameter in substitute.idle()]
        for layer in self.spec.sharing.consumers:
            idle += self.adapter.kv.idle(self.adapter.find_attention(model, layer))
        # an unused weight that asks for a gradient stops distributed training
        self.frozen += [parameter for parameter in idle if parameter.requires_grad]
        for parameter in self.frozen:
            parameter.requires_grad_(False)
        for layer, weights in self.residuals.items():
            self.adapter.find_attention(model, layer).add_module(residual.ATTRIBUTE, weights)
        decoder.register_forward_pre_hook(BeforeDecoder(self.spec, self.name, self.adapter), with_kwargs=True)
        if self.spec.sharing.early_exit and model is not decoder:
            model.register_forward_pre_hook(early_exit.ask, with_kwargs=True)
            for layer in self.spec.sharing.upper:
                self.adapter.find_layers(model)[layer].register_forward_pre_hook(early_exit.cut, with_kwargs=True)
        if self.spec.sharing.part_of_model and hasattr(model, "save_pretrained"):
            model.save_pretrained = partial(save_pretrained, model, self.spec.sharing)
            model._upload_modified_files = partial(upload, model, self.spec.sharing)
        if self.spec.prefix is not None:
            decoder.register_forward_hook(store_prefix, with_kwargs=True)
        if self.spec.eviction is not None and self.spec.eviction.deferred:
            decoder.register_forward_hook(after_decoder, with_kwargs=True)
        if hasattr(model, "_prepare_cache_for_generation"):
            # a partial, not a bound method: it survives pickling and a deep copy is bound to the copied model
            model._prepare_cache_for_generation = partial(prepare_cache_for_generation, model)
        model.__dict__[ATTRIBUTE] = self

    def restore(self, model: nn.Module, decoder: nn.Module) -> None:
        """Makes the model what it was before `install`, also when that stopped half-way."""
        if self.compiled is not None:
            self.compiled.remove(model)
        for parent, attribute, original in self.originals:
            setattr(parent, attribute, original)
        for parameter in self.frozen:
            parameter.requires_grad_(True)
        swap_config(model, self.config, self.original_config)
        if self.first_config is not None:
            carry_over(self.config, self.first_config, self.original_config)
        for module in (model, decoder, *self.adapter.find_layers(model)):
            _remove_hooks(module)
        for layer in self.residuals:
            self.adapter.find_attention(model, layer)._modules.pop(residual.ATTRIBUTE, None)
        for name in METHODS:
            model.__dict__.pop(name, None)
        model.__dict__.update(self.own_methods)
        model.__dict__.pop(ATTRIBUTE, None)
        # last, since it waits for what is still being written
        if self.spec.prefix is not None:
            self.spec.prefix.close()


def attached(model: nn.Module) -> Attachment | None:
    """The attachment of a patched model, None for any other."""
    return getattr(model, "__dict__", {}).get(ATTRIBUTE)


def require_attached(model: nn.Module) -> Attachment:
    """The attachment of a patched model; raises for any other."""
    attachment = attached(model)
    if attachment is None:
        raise ValueError(f"this {type(model).__name__} is not patched; call patch_model first")
    return attachment


def _remove_hooks(module: nn.Module) -> None:
    """Takes our hooks, and no others, off a module."""
    ours = (early_exit.ask, early_exit.cut, after_decoder, store_prefix)
    for hooks, with_kwargs in (
        (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
        (module._forward_hooks, module._forward_hooks_with_kwargs),
    ):
        for key in [key for key, hook in hooks.items() if isinstance(hook, BeforeDecoder) or hook in ours]:
            del hooks[key]
            with_kwargs.pop(key, None)


def attach(model: nn.Module, adapter: Adapter, spec: CacheSpec, previous: Attachment | None = None) -> None:
    """Gives `model`, which must not be patched, the cache that `spec` describes; on an error leaves it as it was.

    Args:
        previous: what was attached before. If its plan adds the same trainable weights, they go on.
    """
    decoder = adapter.find_decoder(model)
    substitutes = [*skip_projections(model, adapter, spec), *heal_projections(decoder, spec)]
    name = register(model.config._attn_implementation)
    attachment = Attachment(adapter, spec, name, copy.deepcopy(model.config), model.config)
    attachment.residuals = make_residuals(model, adapter, spec, previous)
    try:
        attachment.install(model, decoder, substitutes)
    except Exception:
        attachment.restore(model, decoder)
        raise


def make_residuals(
    model: nn.Module, adapter: Adapter, spec: CacheSpec, previous: Attachment | None
) -> dict[int, residual.KVResidual]:
    """The trainable weights that the plan adds, by layer: those that were attached before, or new ones."""
    plan = spec.sharing.residual
    if plan is None:
        return {}
    if previous is not None and previous.spec.sharing.residual == plan:
        return previous.residuals
    found = {}
    for layer in plan.mixing:
        weight = getattr(adapter.find_attention(model, layer), adapter.output).weight
        found[layer] = residual.KVResidual(plan.scale, weight.device)
    return found


def detach(model: nn.Module) -> Attachment | None:
    """Takes the cache off a patched model, restores what it replaced and returns what was attached."""
    attachment = attached(model)
    if attachment is not None:
        attachment.restore(model, attachment.adapter.find_decoder(model))
    return attachment


class BeforeDecoder:
    """The hook before the decoder's forward: gives it a cache, and refuses what would go wrong in silence.

    A class, not a closure, so that a patched model can be copied and pickled.
    """

    def __init__(self, spec: CacheSpec, name: str, adapter: Adapter) -> None:
        self.spec, self.name, self.adapter = spec, name, adapter

    def __call__(self, decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if args:
            kwargs = inspect.signature(decoder.forward).bind(*args, **kwargs).arguments
            kwargs.update(kwargs.pop("kwargs", {}))
            args = ()
        cache = kwargs.get("past_key_values")
        use_cache = kwargs.get("use_cache")
        if use_cache is None:
            use_cache = decoder.config.use_cache
        checkpointing = decoder.training and getattr(decoder, "gradient_checkpointing", False)
        if cache is None and use_cache and not checkpointing:
            cache = kwargs["past_key_values"] = KVCache(self.spec)
        self._check(decoder, kwargs)
        if isinstance(cache, KVCache) and kwargs.get("input_ids") is not None:
            cache.remember_prompt(kwargs["input_ids"], kwargs.get("position_ids"))
        if isinstance(cache, KVCache) and self.spec.prefix is not None:
            adopt_prefix(decoder, cache, kwargs, self.adapter)
        # checkpointed layers are not given the cache, so producers' KV must reach consumers in another way
        if (cache is None or checkpointing) and not self.spec.sharing.is_identity:
            if checkpointing and reentrant_checkpointing(decoder):
                raise NotImplementedError(
                    "reentrant gradient checkpointing gives wrong gradients when layers share KV; "
                    "call gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False})"
                )
            kwargs["kv_sharing"] = SharingContext(self.spec.sharing, self._residual(decoder))
        elif cache is not None:
            cache.residual = self._residual(decoder)
        if cache is not None and self.spec.scorer is not None and self.spec.scorer.rotates:
            kwargs["kv_rotation"] = partial(self.adapter.rotary.of, decoder)
        if kwargs.get(early_exit.POSITIONS) and cache is not None:
            wanted = early_exit.widened(kwargs[early_exit.POSITIONS], self.spec, kwargs.get("attention_mask"))
            kwargs[early_exit.POSITIONS] = wanted
        return args, kwargs

    def _residual(self, decoder: nn.Module) -> ResidualContext | None:
        """What carries the KV of bottom layers through one forward, None where none is added."""
        plan = self.spec.sharing.residual
        if plan is None:
            return None
        attentions = {layer: self.adapter.find_attention(decoder, layer) for layer in plan.mixing}
        return ResidualContext(plan, {layer: residual.residual_of(module) for layer, module in attentions.items()})

    def _check(self, decoder: nn.Module, kwargs: dict[str, Any]) -> None:
        cache = kwargs.get("past_key_values")
        if cache is not None:
            require_own_cache(cache, self.spec)
            mask = kwargs.get("attention_mask")
            if isinstance(mask, torch.Tensor) and mask.dim() == 4:
                raise NotImplementedError(
                    "a 4-D attention mask cannot be combined with a sealed cache, expected a 2-D mask of padding; "
                    "pass one, or use_cache=False"
                )
            given = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
            if given is not None and not cache.replaying and cache.batch_size not in (-1, len(given)):
                raise ValueError(
                    f"the cache holds {cache.batch_size} rows and the input has {len(given)}; give as many, or repeat "
                    "those of the cache with cache.batch_repeat_interleave(n)"
                )
            if given is not None and not given.shape[1]:
                raise ValueError(
                    f"expected tokens that go on after the {cache.get_seq_length()} that the cache has read, got none; "
                    "generate takes the whole text, with what was read at its beginning: "
                    "torch.cat([context_ids, question_ids], dim=1)"
                )
        if decoder.config._attn_implementation != self.name:
            raise RuntimeError(
                f"the attention of this patched model was changed to {decoder.config._attn_implementation!r}; "
                "unpatch_model first, change it, and patch again"
            )
        if kwargs.get("output_attentions", decoder.config.output_attentions):
            raise NotImplementedError(
                "a patched model computes no attention weights; unpatch_model before asking for output_attentions"
            )


def after_decoder(decoder: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
    """The hook after the decoder's forward where layers decide together what to evict: once a prompt is in, they do."""
    cache = kwargs.get("past_key_values")
    if not isinstance(cache, KVCache) or cache.replaying or not cache.pending:
        return
    if cache.prompt_so_far() is None:
        raise NotImplementedError(
            "this eviction method reads the prompt again and needs its token ids, but the model was given "
            "inputs_embeds; pass input_ids, or use a method that does not (snapkv, expected_attention)"
        )

    def run(ids: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor) -> None:
        decoder(input_ids=ids, attention_mask=mask, position_ids=positions.to(ids.device), past_key_values=cache)

    with torch.no_grad():
        settle(cache, kwargs.get("attention_mask"), run)
    cache.forget_prompt()


def require_own_cache(cache: Any, spec: CacheSpec) -> None:
    """Raises unless `cache` was made for a model patched like this one."""
    if not isinstance(cache, KVCache):
        raise TypeError(
            f"this model is patched and takes a KVCache, got a {type(cache).__name__}; pass none, or new_cache(model)"
        )
    own = (spec.sharing.source_layers, spec.sliding_windows)
    same = (cache.spec.sharing.source_layers, cache.spec.sliding_windows) == own
    if not same or not matches(cache.spec.fingerprint, spec.fingerprint):
        raise ValueError("this cache was made for another model or another plan; make one with new_cache(model)")


def prepare_cache_for_generation(
    model: nn.Module,
    generation_config,
    model_kwargs: dict[str, Any],
    generation_mode,
    batch_size: int,
    max_cache_length: int,
) -> None:
    """Takes the place of the method of the same name: makes our cache and tells it how long the prompt is."""
    spec = require_attached(model).spec
    if generation_config.cache_implementation not in UNDEMANDING:
        raise ValueError(
            f"this model is patched and makes its own cache, but cache_implementation="
            f"{generation_config.cache_implementation!r} asks for another; leave it out, or unpatch_model first"
        )
    cache = model_kwargs.get("past_key_values")
    if cache is not None:
        require_own_cache(cache, spec)
        cache._is_user_defined = True
    elif generation_config.use_cache is False:
        return
    else:
        cache = model_kwargs["past_key_values"] = KVCache(spec)
    copies = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
    rows, length = prompt_shape(model_kwargs)
    if not cache.get_seq_length():
        cache.expect(length, copies)
    elif cache.batch_size * copies == rows:
        # the prompt comes as often as there are beams or samples, and so must what was read before
        cache.batch_repeat_interleave(copies)
    if generation_config.is_assistant:
        # what it drafts is rolled back
        cache.activate_past_recording()


def prompt_shape(model_kwargs: dict[str, Any]) -> tuple[int, int]:
    """Rows and tokens of the prompt, padding included, as `generate` knows them before the first forward."""
    for name in ("attention_mask", "position_ids", "inputs_embeds"):
        if isinstance(model_kwargs.get(name), torch.Tensor):
            return tuple(model_kwargs[name].shape[:2])
    raise RuntimeError(
        "generate gave neither an attention mask nor position ids, so the length of the prompt is unknown; "
        "pass attention_mask"
    )
