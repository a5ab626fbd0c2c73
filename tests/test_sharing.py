"""`SharingPlan`: chains resolve, plans survive a file, and what consumers do not need is not computed."""

import pytest
import torch

from hf_kvcache import KVSharer, SharingPlan, patch_model, unpatch_model
from hf_kvcache.testing import greedy, random_ids, sharing_maps, tiny_model


def test_identity_shares_nothing():
    plan = SharingPlan.identity(4)
    assert plan.source_layers == (0, 1, 2, 3)
    assert plan.is_identity and plan.consumers == () and plan.num_layers == 4
    assert plan.last_reader == {0: 0, 1: 1, 2: 2, 3: 3}


@pytest.mark.parametrize(
    ("pairs", "source_layers"),
    [
        ([], (0, 1, 2, 3, 4)),
        ([(4, 0)], (0, 1, 2, 3, 0)),
        ([(3, 1), (1, 0)], (0, 0, 2, 0, 4)),
        ([(1, 0), (3, 1)], (0, 0, 2, 0, 4)),
        ([(4, 3), (3, 2), (2, 1), (1, 0)], (0, 0, 0, 0, 0)),
        ([(2, 1), (3, 1), (4, 1)], (0, 1, 1, 1, 1)),
    ],
    ids=["none", "one", "chain", "chain-reversed", "long-chain", "star"],
)
def test_chains_resolve_to_the_layer_that_owns_its_kv(pairs, source_layers):
    plan = SharingPlan.from_pairs(5, pairs)
    assert plan.source_layers == source_layers
    assert plan.consumers == tuple(layer for layer in range(5) if source_layers[layer] != layer)
    assert plan.is_identity == (not pairs)


def test_last_reader_is_the_last_layer_that_reads():
    assert SharingPlan((0, 0, 2, 0, 2)).last_reader == {0: 3, 2: 4}


def test_layer_zero_never_reads_another():
    with pytest.raises(ValueError, match="source < consumer"):
        SharingPlan.from_pairs(3, [(0, 1)])


@pytest.mark.parametrize("healed", [{}, {"layers.1.self_attn.o_proj": torch.randn(6, 5)}], ids=["plain", "healed"])
def test_a_plan_survives_its_file(tmp_path, healed):
    plan = SharingPlan((0, 0, 2), healed, "abc-def", {"share": "0.25", "order": "dissimilar"})
    plan.save(tmp_path / "plan.safetensors")
    loaded = SharingPlan.load(str(tmp_path / "plan.safetensors"))
    assert loaded.source_layers == plan.source_layers
    assert loaded.fingerprint == plan.fingerprint and dict(loaded.settings) == dict(plan.settings)
    assert loaded.healed.keys() == healed.keys()
    assert all(torch.equal(loaded.healed[name], weight) for name, weight in healed.items())


def test_healed_views_are_saved_as_they_look(tmp_path):
    weight = torch.randn(5, 6).T
    SharingPlan((0, 0), {"layers.1.self_attn.o_proj": weight}).save(tmp_path / "plan.safetensors")
    assert torch.equal(SharingPlan.load(tmp_path / "plan.safetensors").healed["layers.1.self_attn.o_proj"], weight)


def test_a_plan_file_is_safetensors_with_readable_metadata(tmp_path):
    from safetensors import safe_open

    SharingPlan((0, 0, 2), fingerprint="abc-def").save(tmp_path / "plan.safetensors")
    with safe_open(tmp_path / "plan.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert "sharing_plan" in metadata["format"]
    assert "[0, 0, 2]" in str(metadata) and "abc-def" in str(metadata)


def test_a_saved_plan_can_be_given_by_its_path(tmp_path):
    plan = SharingPlan((0, 0, 2, 2))
    plan.save(tmp_path / "plan.safetensors")
    ids = random_ids(length=12)
    expected = greedy(patch_model(tiny_model("llama"), KVSharer(plan=plan)), ids)
    for path in (tmp_path / "plan.safetensors", str(tmp_path / "plan.safetensors")):
        assert torch.equal(greedy(patch_model(tiny_model("llama"), "kvsharer", plan=path), ids), expected)


def test_healed_weights_are_used_and_put_back():
    model = tiny_model("llama")
    ids = random_ids(length=12)
    plain = greedy(model, ids)
    weight = torch.randn(48, 48) / 7
    name = "model.layers.2.self_attn.o_proj.weight"
    original = model.state_dict()[name].clone()

    healed = SharingPlan((0, 0, 0, 3), {"layers.2.self_attn.o_proj": weight})
    actual = greedy(patch_model(model, KVSharer(plan=healed)), ids)
    assert torch.equal(model.state_dict()[name], original)
    assert torch.equal(greedy(unpatch_model(model), ids), plain)

    # the same as writing the weight into the model
    with torch.no_grad():
        model.model.layers[2].self_attn.o_proj.weight.copy_(weight)
    expected = greedy(patch_model(model, KVSharer(plan=SharingPlan((0, 0, 0, 3)))), ids)
    assert torch.equal(actual, expected)


# what consumers do not need is not computed


class CountingLinear:
    """Counts every call of `nn.Linear.forward` by its weight, and whatever reads the weight through `linear`."""

    def __init__(self, monkeypatch):
        self.calls: dict[int, int] = {}
        self.rows: dict[int, set[int]] = {}
        original = torch.nn.functional.linear

        def linear(input, weight, bias=None):
            storage = weight.untyped_storage().data_ptr()
            self.calls[storage] = self.calls.get(storage, 0) + 1
            self.rows.setdefault(storage, set()).add(weight.shape[0])
            return original(input, weight, bias)

        monkeypatch.setattr(torch.nn.functional, "linear", linear)

    def of(self, weight: torch.Tensor) -> int:
        return self.calls.get(weight.untyped_storage().data_ptr(), 0)


@pytest.mark.parametrize(
    "family", ["llama", "qwen2", "qwen3", "olmo2", "cohere", "gemma2", "gemma3_text", "starcoder2"]
)
def test_consumers_never_project_keys_and_values(family, monkeypatch):
    model = tiny_model(family)
    attentions = [layer.self_attn for layer in model.model.layers]
    projections = [(attention.k_proj, attention.v_proj) for attention in attentions]
    hooked: dict[torch.nn.Module, int] = {}
    for module in (module for pair in projections for module in pair):
        hooked[module] = 0
        module.register_forward_hook(lambda module, args, out: hooked.__setitem__(module, hooked[module] + 1))
    plan = SharingPlan.from_pairs(4, sharing_maps(model)["several"])
    assert plan.consumers
    patch_model(model, KVSharer(plan=plan))
    counted = CountingLinear(monkeypatch)

    for run, forwards in (
        (lambda: greedy(model, random_ids(length=12), tokens=5), 5),
        (lambda: greedy(model, random_ids(length=12), tokens=5, prefill_chunk_size=4), 7),
        (lambda: model(random_ids(length=12), use_cache=False), 1),
    ):
        hooked.update(dict.fromkeys(hooked, 0))
        counted.calls.clear()
        run()
        for layer, pair in enumerate(projections):
            expected = 0 if layer in plan.consumers else forwards
            for module in pair:
                assert hooked[module] == counted.of(module.weight) == expected, f"layer {layer}"


def test_fused_consumers_project_queries_only(monkeypatch):
    model = tiny_model("phi3")
    weights = [layer.self_attn.qkv_proj.weight for layer in model.model.layers]
    patch_model(model, KVSharer(plan=SharingPlan((0, 0, 2, 0))))
    counted = CountingLinear(monkeypatch)
    greedy(model, random_ids(length=12), tokens=5)
    rows = [counted.rows[weight.untyped_storage().data_ptr()] for weight in weights]
    assert rows == [{48 + 2 * 16}, {48}, {48 + 2 * 16}, {48}]
    assert [counted.of(weight) for weight in weights] == [5] * 4


def test_consumers_come_back_to_life(monkeypatch):
    model = tiny_model("llama")
    patch_model(model, KVSharer(plan=SharingPlan((0, 0, 0, 0))))
    unpatch_model(model)
    counted = CountingLinear(monkeypatch)
    greedy(model, random_ids(length=12), tokens=5)
    assert [counted.of(layer.self_attn.k_proj.weight) for layer in model.model.layers] == [5] * 4


@pytest.mark.parametrize("kind", ["k_proj", "v_proj", "qkv_proj"])
def test_projections_of_consumers_do_not_matter(kind):
    family = "phi3" if kind == "qkv_proj" else "llama"
    model = tiny_model(family)
    ids = random_ids(length=12)
    patch_model(model, KVSharer(plan=SharingPlan((0, 0, 2, 2))))
    expected = greedy(model, ids)
    with torch.no_grad():
        for layer in (1, 3):
            weight = dict(model.named_parameters())[f"model.layers.{layer}.self_attn.{kind}.weight"]
            weight[48 if kind == "qkv_proj" else 0 :].fill_(torch.nan)
    assert torch.equal(greedy(model, ids), expected)
