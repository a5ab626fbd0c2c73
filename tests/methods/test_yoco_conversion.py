"""`convert`: what each way to begin makes of the weights of the middle layer, and what it refuses."""

import pytest
import torch

from hf_kvcache import Yoco, YocoPlusPlus, convert, new_cache
from hf_kvcache.testing import random_ids
from tests.forward import logits
from tests.methods.yoco import DEEP, fresh, patched


def calibration():
    return random_ids(batch=40, length=160)


@pytest.mark.parametrize(
    ("init", "method"),
    [
        ("reuse", "yoco++"),
        ("mean", "yoco"),
        ("mean", "yoco++"),
        ("ridge", "yoco"),
        ("ridge", "yoco++"),
        ("heal", "yoco++"),
    ],
)
def test_conversion(init, method):
    model = fresh(**DEEP)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    assert convert(model, method, split=0.5, init=init, calibration=calibration()) is model
    changed = {name for name, weight in before.items() if not torch.equal(model.state_dict()[name], weight)}
    middle = {f"model.layers.2.self_attn.{name}_proj.weight" for name in "kv"}
    upper = {f"model.layers.{layer}.self_attn.{name}_proj.weight" for layer in (3, 4, 5) for name in "qo"}
    assert changed == {"reuse": set(), "mean": middle, "ridge": middle, "heal": upper}[init]
    assert new_cache(model).spec.sharing.source_layers == (0, 1, 2, 2, 2, 2)


def test_mean_is_the_mean():
    model = fresh(**DEEP)
    weights = [layer.self_attn.k_proj.weight.clone() for layer in model.model.layers]
    convert(model, "yoco", split=0.5, init="mean")
    found = model.model.layers[2].self_attn.k_proj.weight
    torch.testing.assert_close(found, sum(weights[2:]) / 4)


def with_biases(family="qwen2"):
    """A model whose key and value biases are large and differ by layer."""
    model, generator = fresh(family, **DEEP), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in model.model.layers:
            for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
                projection.bias.copy_(10 * torch.randn(projection.bias.shape, generator=generator))
    return model


def test_mean_takes_biases_too():
    model = with_biases()
    biases = [layer.self_attn.v_proj.bias.clone() for layer in model.model.layers]
    convert(model, "yoco", split=0.5, init="mean")
    torch.testing.assert_close(model.model.layers[2].self_attn.v_proj.bias, sum(biases[2:]) / 4)


@pytest.mark.parametrize("name", ["k_proj", "v_proj"])
def test_ridge_fits_an_intercept(name):
    model, wanted, inputs = with_biases(), {}, {}
    projections = [getattr(layer.self_attn, name) for layer in model.model.layers]

    def remember(module, args, output):
        wanted.setdefault(module, output.flatten(0, 1).double())
        inputs.setdefault(module, args[0].flatten(0, 1).double())

    for projection in projections:
        projection.register_forward_hook(remember)
    # which runs the model as it was on what it fits to
    convert(model, "yoco", split=0.5, init="ridge", calibration=calibration())
    mean = torch.stack([wanted[projection] for projection in projections[2:]]).mean(0)
    middle = projections[2]
    found = inputs[middle] @ middle.weight.detach().double().T + middle.bias.detach().double()
    # what a regression with an intercept leaves has no mean
    assert float((found - mean).mean(0).abs().max()) <= 1e-4
    with_ones = torch.cat([inputs[middle], torch.ones(len(mean), 1, dtype=torch.double)], 1)
    best = with_ones @ torch.linalg.lstsq(with_ones, mean).solution
    assert float((found - mean).norm()) <= 1.01 * float((best - mean).norm())


def test_ridge_is_nearer_to_the_mean_of_the_values_than_what_it_replaces():
    model, ids = fresh("qwen2", **DEEP), calibration()
    wanted, inputs = {}, {}
    projections = [layer.self_attn.v_proj for layer in model.model.layers]

    def remember(module, args, output):
        wanted.setdefault(module, output)
        inputs.setdefault(module, args[0])

    for projection in projections:
        projection.register_forward_hook(remember)
    logits(model, ids[:, :128])
    mean = torch.stack([wanted[projection] for projection in projections[2:]]).mean(0)
    middle = projections[2]
    convert(model, "yoco", split=0.5, init="ridge", calibration=ids)
    with torch.no_grad():
        refitted = torch.nn.functional.linear(inputs[middle], middle.weight, middle.bias)
    before, after = (float((values - mean).square().mean()) for values in (wanted[middle], refitted))
    assert after < 0.7 * before


def test_bad_conversions_are_refused():
    with pytest.raises(ValueError, match="yoco or yoco"):
        convert(fresh(), "snapkv")
    with pytest.raises(ValueError, match="init must be one of"):
        convert(fresh(), init="random")
    with pytest.raises(ValueError, match="unpatch_model first"):
        convert(patched())
    with pytest.raises(ValueError, match="set them on the instance"):
        convert(fresh(), Yoco(), split=0.5)
    with pytest.raises(NotImplementedError, match="init='reuse'"):
        convert(fresh("phi3"), init="mean")
    with pytest.raises(ValueError, match="residual_scale"):
        YocoPlusPlus(residual_scale=0)
