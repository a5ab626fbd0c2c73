"""yoco and yoco++ on existing models: what is stored, residuals against a plain computation, early exit, training."""

import copy
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import hf_kvcache.models  # noqa: F401 - registers the class of saved models
from hf_kvcache import KVSharer, Yoco, YocoPlusPlus, compress, convert, new_cache, patch_model, report, unpatch_model
from hf_kvcache.patches.attach import require_attached
from hf_kvcache.resolve import resolve, split_names
from hf_kvcache.sharing import SharingPlan
from hf_kvcache.testing import (
    FAMILIES,
    greedy,
    greedy_by_forward,
    left_pad,
    live_bytes,
    model_state,
    random_ids,
    tiny_model,
)

every_family = pytest.mark.parametrize("family", FAMILIES)
# deep enough that layers of both kinds have something to add
MIXED = {"num_hidden_layers": 8, "layer_types": ["sliding_attention", "full_attention"] * 4}
DEEP = {"num_hidden_layers": 6}


def fresh(family="llama", **changes):
    if family in ("cohere2", "gemma2", "gemma3_text", "ministral", "olmo3"):
        changes = {**MIXED, **changes}
    return tiny_model(family, **changes)


def patched(family="llama", method="yoco++", **options):
    return patch_model(fresh(family), method, **options)


@torch.no_grad()
def logits(model, ids, **kwargs):
    return model(ids, **kwargs).logits


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-4)


def shake(model, seed=0):
    """Gives the residual weights values that matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "kv_residual" in name:
                weight.add_(torch.randn(2, generator=generator) * 0.01)
    return model


def residual_names(model):
    return [name for name, _ in model.named_parameters() if "kv_residual" in name]


@every_family
def test_yoco_plus_plus_is_yoco_at_the_start(family):
    ids = random_ids(batch=2, length=21)
    plain, residual = patched(family, "yoco"), patched(family, "yoco++")
    for kwargs in ({}, {"use_cache": False}):
        assert torch.equal(logits(residual, ids, **kwargs), logits(plain, ids, **kwargs))
    assert torch.equal(greedy(residual, ids), greedy(plain, ids))


@every_family
def test_cached_decoding_is_one_full_pass_with_residuals(family):
    model = shake(patched(family))
    ids = random_ids(batch=2, length=21)
    chosen = greedy(model, ids)
    whole = logits(model, torch.cat([ids, chosen], dim=1), use_cache=False)[:, 20:-1]
    assert torch.equal(whole.argmax(-1), chosen)
    assert not torch.equal(greedy(patched(family, "yoco"), ids), chosen)


@every_family
def test_early_exit_is_exact(family):
    ids, mask = left_pad([random_ids(length=length)[0] for length in (21, 9)])
    model, without = shake(patched(family)), shake(patched(family, early_exit=False))
    assert torch.equal(greedy(model, ids, attention_mask=mask), greedy(without, ids, attention_mask=mask))
    for kwargs in ({}, {"use_cache": False}):
        found = logits(model, ids, attention_mask=mask, logits_to_keep=2, **kwargs)
        close(found, logits(without, ids, attention_mask=mask, logits_to_keep=2, **kwargs))


def test_upper_layers_run_for_one_position():
    model, seen = patched(method="yoco", split=0.75), {}
    for index, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(lambda module, args, output, index=index: seen.update({index: output.shape[1]}))
    logits(model, random_ids(length=30), logits_to_keep=1)
    assert seen == {0: 30, 1: 30, 2: 30, 3: 1}
    logits(model, random_ids(length=30))
    assert seen == dict.fromkeys(range(4), 30)


def test_compressing_a_context_skips_the_upper_layers():
    model, ids, seen = shake(patched()), random_ids(length=20), []
    model.model.layers[3].mlp.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    cache = compress(model, ids)
    assert seen == [1]
    assert torch.equal(
        greedy_by_forward(model, ids[:, -1:], cache=cache),
        greedy_by_forward(model, ids[:, -1:], cache=whole(model, ids)),
    )


def whole(model, ids):
    """The cache after a forward over all positions."""
    with torch.no_grad():
        return model(ids).past_key_values


@pytest.mark.parametrize("method", ["yoco", "yoco++"])
@pytest.mark.parametrize(("split", "kept"), [(0.5, 2), (0.75, 3), (1, 1), (3, 3)])
def test_bytes_follow_the_split(method, split, kept):
    model, ids = patched(method=method, split=split), random_ids(batch=2, length=37)
    with torch.no_grad():
        cache = model(ids).past_key_values
        full = live_bytes(fresh()(ids).past_key_values)
    assert live_bytes(cache) * 4 == full * kept
    assert report(cache).bytes == live_bytes(cache)


def test_upper_layers_compute_no_keys_and_values():
    model, called = fresh(), []
    for index, layer in enumerate(model.model.layers):
        for name in ("k_proj", "v_proj"):
            module = getattr(layer.self_attn, name)
            module.register_forward_hook(lambda *_, index=index: called.append(index))
    greedy(patch_model(model, "yoco"), random_ids(length=9), tokens=3)
    assert set(called) == {0, 1}


@pytest.mark.parametrize("use_cache", [True, False])
def test_hidden_states_are_of_all_positions(use_cache):
    model, ids = patched(method="yoco"), random_ids(length=9)
    asked = {"logits_to_keep": 1, "use_cache": use_cache}
    with torch.no_grad():
        found = model(ids, output_hidden_states=True, **asked)
    assert [hidden.shape[1] for hidden in found.hidden_states] == [9] * 5
    close(found.logits, logits(model, ids, **asked))


class Plain:
    """A Llama forward with YOCO++ written out, for one sequence and no cache."""

    def __init__(self, model):
        self.model = model
        plan = require_attached(model).spec.sharing
        self.sources = plan.source_layers

    def __call__(self, ids):
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        decoder = self.model.model
        hidden = decoder.embed_tokens(ids)
        positions = torch.arange(ids.shape[1])[None]
        cos, sin = decoder.rotary_emb(hidden, positions)
        stored, first = {}, None
        for index, layer in enumerate(decoder.layers):
            x, attention = layer.input_layernorm(hidden), layer.self_attn
            shape = (1, ids.shape[1], -1, attention.head_dim)
            query = attention.q_proj(x).view(shape).transpose(1, 2)
            if self.sources[index] == index:
                key, value = (p(x).view(shape).transpose(1, 2) for p in (attention.k_proj, attention.v_proj))
                query, key = apply_rotary_pos_emb(query, key, cos, sin)
                if index == 0:
                    first = key, value
                else:
                    a, b = attention.kv_residual.key_weight
                    c, d = attention.kv_residual.value_weight
                    key, value = 35 * (a * first[0] + b * key), 35 * (c * first[1] + d * value)
                stored[index] = key, value
            else:
                query, _ = apply_rotary_pos_emb(query, query, cos, sin)
            key, value = stored[self.sources[index]]
            group = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
            scores = query @ key.transpose(-1, -2) * attention.scaling
            future = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1)
            mixed = scores.masked_fill(future, -torch.inf).softmax(-1) @ value
            hidden = hidden + attention.o_proj(mixed.transpose(1, 2).flatten(2))
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return self.model.lm_head(decoder.norm(hidden))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_residual_is_the_formula(attention, use_cache):
    model = fresh(**DEEP)
    model.set_attn_implementation(attention)
    shake(patch_model(model, "yoco++"))
    ids = random_ids(length=17)
    with torch.no_grad():
        close(logits(model, ids, use_cache=use_cache), Plain(model)(ids))


def test_the_mixed_kv_is_stored():
    model, ids = shake(patched()), random_ids(length=9)
    with torch.no_grad():
        model(ids)
        cache = model(ids).past_key_values
        plain = patched(method="yoco")
        below = plain(ids).past_key_values
    own = model.model.layers[1].self_attn.kv_residual
    dense = [[layer.segments[0].dense()[0] for layer in found.layers[:2]] for found in (cache, below)]
    for head in range(2):
        for part, weight in enumerate((own.key_weight, own.value_weight)):
            first, second = (35 * weight).tolist()
            # layer 0 is as it was, and its output with it
            expected = first * dense[1][0][head][part] + second * dense[1][1][head][part]
            torch.testing.assert_close(dense[0][0][head][part], dense[1][0][head][part])
            torch.testing.assert_close(dense[0][1][head][part], expected, rtol=1e-4, atol=1e-4)


def test_nothing_of_a_forward_stays_in_the_cache():
    model = shake(patched())
    with torch.no_grad():
        cache = model(random_ids(length=9)).past_key_values
    assert cache.residual is None
    assert report(cache).bytes == live_bytes(cache)
    copy.deepcopy(cache)


def test_layers_of_one_kind_share():
    windows = (8, None, 8, None, 8, None)
    plan = Yoco(split=4).plan(windows)
    assert plan.source_layers == (0, 1, 2, 3, 2, 3)
    assert YocoPlusPlus(split=4).plan(windows).residual.sources == (0, 1, 0, 1, 4, 5)


@every_family
def test_gradients_reach_the_residual_weights(family):
    ids, found = random_ids(batch=2, length=15), []
    for checkpointing in (False, True):
        model = shake(patched(family)).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(ids, labels=ids).loss.backward()
        found.append({name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad})
    assert residual_names(model)
    for name, grad in found[0].items():
        # consumers' own key norms have nothing to do, and not every expert is asked
        if "experts" not in name and "k_norm" not in name:
            assert grad is not None and bool(grad.abs().sum() > 0), name
        if grad is not None:
            torch.testing.assert_close(found[1][name], grad, rtol=1e-3, atol=1e-6)


def test_gradients_at_the_start_too():
    model, ids = patched().train(), random_ids(batch=2, length=15)
    model(ids, labels=ids).loss.backward()
    for name, weight in model.named_parameters():
        if "kv_residual" in name:
            assert bool((weight.grad != 0).all()), name


# composition and patching


@pytest.mark.parametrize("order", ["yoco+++turboquant", "turboquant+yoco++"])
def test_composes_with_a_codec(order):
    model, ids = shake(patched(method=order)), random_ids(batch=2, length=40)
    assert report(model(ids).past_key_values).ratio > 3
    assert greedy(model, ids).shape == (2, 12)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("snapkv", {"budget": 12, "window": 4}),
        ("h2o", {"budget": 12}),
        ("adakv+criticalkv", {"budget": 12, "window": 4}),
        ("kvzip", {"budget": 0.5, "instructions": ((3, 4), (5, 6))}),
    ],
)
def test_eviction_does_not_depend_on_early_exit(method, options):
    ids, mask = left_pad([random_ids(length=length)[0] for length in (25, 18)])
    found = [
        greedy(shake(patched(method=f"yoco+++{method}", early_exit=exit_, **options)), ids, attention_mask=mask)
        for exit_ in (True, False)
    ]
    assert torch.equal(*found)


def test_the_plan_stays_when_other_methods_are_named():
    model, ids = shake(patched()), random_ids(length=15)
    weights, expected = residual_names(model), greedy(model, ids)
    patch_model(model, "turboquant", bits=2)
    assert residual_names(model) == weights and report(model(ids).past_key_values).layers[3].source == 1
    patch_model(model, None)
    assert torch.equal(greedy(model, ids), expected)
    patch_model(model, KVSharer(plan=SharingPlan.identity(4)))
    assert not residual_names(model)


@pytest.mark.parametrize("method", ["yoco", "yoco++"])
@every_family
def test_unpatch_restores_the_model(family, method):
    model = fresh(family)
    before = model_state(model)
    patch_model(model, method)
    greedy(model, random_ids(length=9), tokens=3)
    before.assert_equal(model_state(unpatch_model(model)))


def test_copies_keep_their_weights_apart():
    model = shake(patched())
    other = shake(copy.deepcopy(model), seed=1)
    ids = random_ids(length=15)
    assert not torch.equal(logits(model, ids), logits(other, ids))


def test_names_that_end_in_two_plus_signs():
    assert split_names("yoco++") == ["yoco++"]
    assert split_names("yoco+++turboquant") == ["yoco++", "turboquant"]
    assert split_names("turboquant+yoco++") == ["turboquant", "yoco++"]
    assert [type(method) for method in resolve("yoco", {})] == [Yoco]
    with pytest.raises(ValueError, match="unknown method ''"):
        resolve("yoco++turboquant", {})


# saving and loading


def same(model, other):
    ids = random_ids(batch=2, length=14)
    assert torch.equal(logits(other.eval(), ids), logits(model.eval(), ids))
    assert torch.equal(greedy(other, ids), greedy(model, ids))


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gemma3_text"])
@pytest.mark.parametrize("method", ["yoco", "yoco++"])
def test_saved_and_loaded_with_the_model(family, method, tmp_path):
    model = shake(patched(family, method))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    same(model, loaded)
    patch_model(loaded, "turboquant")
    assert residual_names(loaded) == residual_names(model)


@pytest.mark.parametrize("options", [{}, {"variant": "some"}, {"max_shard_size": "20KB"}], ids=str)
def test_loaded_from_a_subfolder(options, tmp_path):
    model = shake(patched())
    model.save_pretrained(tmp_path / "below", **options)
    assert (len(list((tmp_path / "below").glob("*.safetensors"))) > 1) == ("max_shard_size" in options)
    asked = {name: value for name, value in options.items() if name == "variant"}
    same(model, AutoModelForCausalLM.from_pretrained(tmp_path, subfolder="below", **asked))


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "20KB"}], ids=str)
def test_loaded_by_the_name_of_a_repository(options, tmp_path):
    model, commit = shake(patched()), "0" * 40
    repository = tmp_path / "models--somebody--some-model"
    model.save_pretrained(repository / "snapshots" / commit, **options)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    place = {"cache_dir": str(tmp_path), "local_files_only": True}
    same(model, AutoModelForCausalLM.from_pretrained("somebody/some-model", **place))


def test_trained_resumed_and_loaded(tmp_path):
    texts = [dict.fromkeys(("input_ids", "labels"), random_ids(length=12, seed=index)[0]) for index in range(8)]

    def trainer(model, steps):
        arguments = TrainingArguments(
            tmp_path, max_steps=steps, per_device_train_batch_size=2, save_steps=2, report_to=[], use_cpu=True
        )
        return Trainer(model, arguments, train_dataset=texts)

    whole = patched()
    start = {name: weight.clone() for name, weight in whole.state_dict().items()}
    trainer(whole, 4).train()
    assert all(not torch.equal(whole.state_dict()[name], start[name]) for name in residual_names(whole))
    resumed = patched()
    trainer(resumed, 4).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, weight in resumed.state_dict().items():
        torch.testing.assert_close(weight, whole.state_dict()[name])
    same(whole, AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-4"))


PLAIN = """
import sys
sys.modules["hf_kvcache"] = None  # an import of it fails, also where it is installed
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained("model")
except ValueError as error:
    print(error)
"""


def test_plain_transformers_says_what_is_missing(tmp_path):
    patched().save_pretrained(tmp_path / "model")
    result = subprocess.run([sys.executable, "-I", "-c", PLAIN], capture_output=True, text=True, cwd=tmp_path)
    assert "model type `needs_hf_kvcache`" in result.stdout, result.stderr


def test_weights_of_another_plan_are_refused(tmp_path):
    import json

    patched().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["hf_kvcache"]["residual"] = None
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="residual weights"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_trained_plan_is_not_saved_alone(tmp_path):
    with pytest.raises(ValueError, match="save_pretrained"):
        Yoco().plan((None,) * 4).save(tmp_path / "plan.safetensors")


# conversion


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


# bad input


@pytest.mark.parametrize("split", [0, 0.0, 1.0, -0.5, 1.5, True, "half"])
def test_impossible_splits_are_refused(split):
    with pytest.raises(ValueError, match="split"):
        Yoco(split=split)


@pytest.mark.parametrize(
    ("layers", "split", "message"),
    [(5, 0.5, "2.5 layers; give the number of layers, 2 or 3"), (4, 4, "leaves 4 of 4"), (4, 7, "leaves 7 of 4")],
)
def test_splits_that_do_not_fit_the_depth_are_refused(layers, split, message):
    model = fresh(num_hidden_layers=layers)
    before = model_state(model)
    with pytest.raises(ValueError, match=message):
        patch_model(model, "yoco", split=split)
    before.assert_equal(model_state(model))


def test_a_split_without_a_layer_of_the_kind_is_refused():
    with pytest.raises(ValueError, match=r"layer 1 has attention window None.*raise split"):
        patch_model(fresh("gemma3_text"), "yoco", split=1)


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


def test_another_sharing_method_is_refused():
    with pytest.raises(ValueError, match=r"yoco.*kvsharer|kvsharer.*yoco"):
        patch_model(fresh(), [Yoco(), KVSharer(plan=SharingPlan.identity(4))])
