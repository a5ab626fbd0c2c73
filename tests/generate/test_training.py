"""Training through a patched model: gradients, checkpointing, what is frozen, and what has no gradient."""

import copy

import pytest
import torch

from hf_kvcache import KVSharer, Offload, SharingPlan, new_cache, patch_model, unpatch_model
from hf_kvcache.testing import greedy, random_ids, tiny_model
from tests.generate.models import every_family, every_method, original, patch, patched

# the newer name of the same switch came after the oldest supported release
quiet_checkpointing = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_.*:FutureWarning")


def gradients(model, ids, **kwargs):
    model.zero_grad()
    model(ids, labels=ids, use_cache=False, **kwargs).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_same_gradients(actual, expected, atol):
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-4, atol=atol, msg=name)


@every_family
def test_gradients_of_an_unshared_model_are_the_unpatched_ones(family):
    ids = random_ids(batch=2, length=14)
    expected = gradients(copy.deepcopy(original(family)).train(), ids)
    actual = gradients(patched(family, "none").train(), ids)
    assert_same_gradients(actual, expected, 1e-5)


@quiet_checkpointing
@every_family
def test_gradients_with_checkpointing_are_those_without(family):
    ids = random_ids(batch=2, length=14)
    model = patched(family, "shared").train()
    expected = gradients(model, ids)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    actual = gradients(model, ids)
    assert_same_gradients(actual, expected, 1e-6)


@quiet_checkpointing
@every_family
def test_reentrant_checkpointing_is_refused_for_shared_layers(family):
    model = patched(family, "shared").train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    ids = random_ids(length=14)
    with pytest.raises(NotImplementedError, match="use_reentrant") as error:
        model(ids, labels=ids)
    assert "wrong gradients" in str(error.value) and "gradient_checkpointing_enable" in str(error.value)
    model.gradient_checkpointing_disable()
    model(ids, labels=ids, use_cache=False).loss.backward()


@every_family
def test_a_training_step_through_shared_layers_lowers_the_loss(family):
    model = patched(family, "shared").train()
    ids = random_ids(batch=4, length=16)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    consumers = new_cache(model).spec.sharing.consumers
    unpatch_model(model)
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    for layer in range(4):
        if family == "phi3":
            rows = model.model.layers[layer].self_attn.qkv_proj.weight[48:]
            moved = not torch.equal(rows, before[f"model.layers.{layer}.self_attn.qkv_proj.weight"][48:])
        else:
            moved = f"model.layers.{layer}.self_attn.k_proj.weight" in changed
        assert moved == (layer not in consumers)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("family", "options"), [("cohere", {"use_qk_norm": True}), ("olmo2", {}), ("phi3", {}), ("qwen3", {})]
)
def test_what_can_be_trained_gets_a_gradient(family, options):
    """Distributed training stops at a weight that does not; one that is used has to learn."""
    model, ids = tiny_model(family, **options), random_ids(batch=2, length=14)
    before = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = gradients(patch(model, "shared").train(), ids)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name, gradient in found.items() if bool(gradient.any())} == trainable
    unused = [f"self_attn.{name}" for name in ("k_proj", "v_proj", "k_norm")]
    consumers = [f"layers.{layer}." for layer in new_cache(model).spec.sharing.consumers]
    frozen = {n for n in before if any(part in n for part in unused) and any(layer in n for layer in consumers)}
    assert before - trainable == frozen
    unpatch_model(model)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == before


@every_family
def test_what_was_frozen_stays_frozen(family):
    model = copy.deepcopy(original(family))
    model.requires_grad_(False)
    last = model.model.layers[-1].self_attn
    names = ["qkv_proj"] if family == "phi3" else ["k_proj", "v_proj"]
    for name in names[1:]:
        getattr(last, name).requires_grad_(True)
    expected = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    patch(model, "shared")
    unpatch_model(model)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == expected


@every_family
@every_method
def test_a_cached_prefill_has_the_same_gradient_as_none(family, method):
    """The prompt of one forward is attended with gradient, whether or not it is cached afterwards."""
    model = patched(family, method)
    ids = random_ids(batch=2, length=14)
    expected = gradients(model, ids)
    model.zero_grad()
    model(ids, labels=ids, use_cache=True).loss.backward()
    for name, gradient in expected.items():
        torch.testing.assert_close(dict(model.named_parameters())[name].grad, gradient, rtol=1e-4, atol=1e-6, msg=name)


@every_family
@every_method
@pytest.mark.parametrize("new", [1, 3, 12])
def test_gradient_through_a_cached_continuation_is_refused(family, method, new):
    model = patched(family, method)
    cache = model(random_ids(length=10)).past_key_values
    out = model(random_ids(length=new, seed=1), past_key_values=cache)
    with pytest.raises(RuntimeError, match="has no gradient") as error:
        out.logits.sum().backward()
    assert "use_cache=False" in str(error.value)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_gradient_through_a_prompt_in_parts_is_refused(family):
    model, ids = patched(family, "none"), random_ids(length=20)
    cache = new_cache(model)
    cache.expect(20)
    parts = [model(part, past_key_values=cache).logits for part in ids.split(10, dim=1)]
    with pytest.raises(RuntimeError, match="has no gradient"):
        torch.cat(parts, dim=1).sum().backward()


@every_method
def test_offloaded_cache_of_a_model_in_training_mode(method):
    """Dropout aside, a model in training mode decodes as in evaluation mode."""
    model = copy.deepcopy(original("llama"))
    methods = [Offload()] if method == "none" else [Offload(), KVSharer(plan=SharingPlan((0, 0, 2, 2)))]
    patch_model(model, methods)
    ids = random_ids(length=12)
    expected = greedy(model, ids)
    assert torch.equal(greedy(model.train(), ids), expected)
