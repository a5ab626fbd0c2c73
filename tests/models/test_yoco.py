"""The original YOCO as a transformers model: exactness of its cache and early exit, and what it refuses."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    Trainer,
    TrainingArguments,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import flash_attention_mask

from hf_kvcache import KVSharer, SharingPlan, Yoco, new_cache, patch_model, report, unpatch_model
from hf_kvcache.models import YocoConfig, YocoForCausalLM
from hf_kvcache.testing import (
    greedy,
    greedy_by_forward,
    left_pad,
    live_bytes,
    model_state,
    random_ids,
    tiny_model,
)

KINDS = ("retention", "window")
every_kind = pytest.mark.parametrize("kind", KINDS)


def model_of(kind, **changes):
    return tiny_model("yoco", self_decoder=kind, **{"sliding_window": 8, "retention_chunk_size": 8, **changes})


@torch.no_grad()
def logits(model, ids, **kwargs):
    return model(ids, **kwargs).logits


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-4)


def patched_or_not(kind, method):
    model = model_of(kind)
    return model if method == "unpatched" else patch_model(model, None if method == "none" else method)


@every_kind
@pytest.mark.parametrize("method", ["unpatched", "none"])
def test_cached_decoding_is_one_full_pass(kind, method):
    model = patched_or_not(kind, method)
    ids = random_ids(batch=2, length=21)
    chosen = greedy(model, ids)
    whole = logits(model, torch.cat([ids, chosen], dim=1), use_cache=False)[:, 20:-1]
    assert torch.equal(whole.argmax(-1), chosen)
    assert torch.equal(greedy_by_forward(model, ids), chosen)


@every_kind
def test_no_method_is_the_unpatched_model(kind):
    model = model_of(kind)
    ids, mask = left_pad([random_ids(length=length)[0] for length in (21, 9, 1)])
    expected, before = greedy(model, ids, attention_mask=mask), model_state(model)
    patch_model(model, None)
    assert torch.equal(greedy(model, ids, attention_mask=mask), expected)
    unpatch_model(model)
    before.assert_equal(model_state(model))


@every_kind
@pytest.mark.parametrize("method", ["unpatched", "none"])
def test_padded_row_is_the_row_alone(kind, method):
    model = patched_or_not(kind, method)
    rows = [random_ids(length=length, seed=length)[0] for length in (23, 11, 3)]
    ids, mask = left_pad(rows)
    batch = greedy(model, ids, attention_mask=mask)
    for index, row in enumerate(rows):
        assert torch.equal(greedy(model, row[None])[0], batch[index])


@every_kind
@pytest.mark.parametrize("method", ["unpatched", "none"])
@pytest.mark.parametrize("chunk", [1, 7])
def test_prefill_may_come_in_chunks(kind, method, chunk):
    model = patched_or_not(kind, method)
    ids = random_ids(batch=2, length=19)
    assert torch.equal(greedy(model, ids, prefill_chunk_size=chunk), greedy(model, ids))


@every_kind
def test_beams_are_those_of_the_unpatched_model(kind):
    model, ids = model_of(kind), random_ids(batch=2, length=14)
    expected = greedy(model, ids, num_beams=3, num_return_sequences=2)
    assert torch.equal(greedy(patch_model(model, None), ids, num_beams=3, num_return_sequences=2), expected)


@every_kind
def test_eager_is_sdpa(kind):
    model, ids = model_of(kind), random_ids(batch=2, length=21)
    other = copy.deepcopy(model)
    other.set_attn_implementation("eager")
    close(logits(other, ids, use_cache=False), logits(model, ids, use_cache=False))
    assert torch.equal(greedy(other, ids), greedy(model, ids))


@pytest.mark.parametrize("method", ["unpatched", "none"])
def test_windows_by_blocks_are_those_of_the_mask(method):
    model = patched_or_not("window", method)
    eager = model_of("window")
    eager.set_attn_implementation("eager")
    for length in (8, 9, 16, 17, 37):
        ids = random_ids(batch=2, length=length)
        for kwargs in ({}, {"use_cache": False}):
            close(logits(model, ids, **kwargs), logits(eager, ids, use_cache=False))
        # a second chunk longer than the window, after a first one
        chunks = greedy(model, ids, tokens=4, prefill_chunk_size=11)
        assert torch.equal(chunks, greedy(eager, ids, tokens=4))


# early exit


@pytest.fixture
def positions():
    """Counts the positions that modules process."""
    seen = {}

    def count(module):
        seen[module] = 0
        module.register_forward_hook(
            lambda module, args, output: seen.__setitem__(module, seen[module] + output.shape[1])
        )

    return seen, count


@every_kind
@pytest.mark.parametrize("method", ["unpatched", "none", "turboquant"])
def test_early_exit_is_exact_and_skips_the_upper_layers(kind, method, positions):
    seen, count = positions
    model = patched_or_not(kind, method)
    ids, mask = left_pad([random_ids(length=length)[0] for length in (21, 9)])
    below = model.config.num_self_decoder_layers
    for layer in model.model.layers:
        count(layer.mlp)
    exact = logits(model, ids, attention_mask=mask, logits_to_keep=1)
    ran = [seen[layer.mlp] for layer in model.model.layers]
    assert ran == [21] * below + [1] * (len(ran) - below)
    model.config.early_exit = False
    close(logits(model, ids, attention_mask=mask, logits_to_keep=1), exact)
    assert [seen[layer.mlp] for layer in model.model.layers] == [42] * below + [22] * (len(ran) - below)
    model.config.early_exit = True
    assert logits(model, ids, attention_mask=mask).shape[1] == 21


@every_kind
@pytest.mark.parametrize("method", ["unpatched", "none", "turboquant", "snapkv"])
@pytest.mark.parametrize("size", [5, 7, 16, 20])
def test_a_prompt_may_be_read_in_parts(kind, method, size):
    model = patched_or_not(kind, method)
    if method == "snapkv":
        # looks at as many of the last queries, which run through the upper layers too
        patch_model(unpatch_model(model), method, window=4, budget=0.5)
    ids, mask = left_pad([random_ids(length=length)[0] for length in (33, 21)])
    for asked in ({}, {"attention_mask": mask}):
        model.config.self_decoder_chunk_size = None
        whole = model(ids, logits_to_keep=1, **asked)
        tokens = greedy(model, ids, **asked)
        model.config.self_decoder_chunk_size = size
        with torch.no_grad():
            parts = model(ids, logits_to_keep=1, **asked)
        close(parts.logits, whole.logits.detach())
        assert live_bytes(parts.past_key_values) <= live_bytes(whole.past_key_values)
        assert torch.equal(greedy(model, ids, **asked), tokens)
    # the largest part that a layer was given
    largest: list[int] = []
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: largest.append(output.shape[1]))
    logits(model, ids, logits_to_keep=1)
    assert max(largest) == size and sum(largest) == 33
    # what is wanted of more positions than a part has comes from one part
    largest.clear()
    close(logits(model, ids, logits_to_keep=22), logits(model, ids)[:, -22:])
    assert largest == [33, 33]


@every_kind
def test_generated_tokens_do_not_depend_on_early_exit(kind):
    model, ids = model_of(kind), random_ids(batch=2, length=17)
    expected = greedy(model, ids)
    model.config.early_exit = False
    assert torch.equal(greedy(model, ids), expected)
    patch_model(model, "snapkv", budget=12, window=4)
    expected = greedy(model, ids)
    model.config.early_exit = True
    # snapkv looks at the last queries of every reader, so the upper layers run for these
    assert torch.equal(greedy(model, ids), expected)


class LargestMask(TorchDispatchMode):
    """Keeps the number of elements of the largest boolean tensor that is made."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor) and found.dtype == torch.bool:
            self.size = max(self.size, found.numel())
        return found


@every_kind
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("rows", [1, 3])
def test_early_exit_makes_no_mask_of_the_whole_prompt(kind, attention, rows):
    model = model_of(kind, self_decoder_chunk_size=16)
    model.set_attn_implementation(attention)
    ids, mask = left_pad([random_ids(length=length)[0] for length in (200, 130)])
    whole = logits(model, ids, attention_mask=mask)
    with LargestMask() as largest:
        found = logits(model, ids, attention_mask=mask, logits_to_keep=rows)
    close(found, whole[:, -rows:])
    # a part of 16 tokens and a window before it, or some rows over all tokens
    assert largest.size <= 2 * 16 * 200


@every_kind
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("use_cache", [True, False])
def test_early_exit_after_earlier_tokens_and_padding(kind, attention, rows, use_cache):
    model = model_of(kind)
    model.set_attn_implementation(attention)
    for ids, mask in (
        left_pad([random_ids(length=length)[0] for length in (30, 19)]),
        (random_ids(batch=2, length=30), torch.ones(2, 30)),
    ):
        whole = logits(model, ids, attention_mask=mask)[:, -rows:]
        start = 14 if use_cache else 0
        past = model(ids[:, :start], attention_mask=mask[:, :start]).past_key_values if use_cache else None
        rest = {"attention_mask": mask, "past_key_values": past, "use_cache": use_cache}
        close(logits(model, ids[:, start:], logits_to_keep=rows, **rest), whole)


def test_early_exit_keeps_sequences_of_one_row_apart():
    model, ids = model_of("retention"), random_ids(length=30)
    asked = {"position_ids": torch.cat([torch.arange(18), torch.arange(12)])[None], "use_cache": False}
    close(logits(model, ids, logits_to_keep=3, **asked), logits(model, ids, **asked)[:, -3:])


@every_kind
@pytest.mark.parametrize("rows", [1, 3])
def test_attention_with_masks_of_padding_alone(kind, rows):
    """Flash takes no other mask than that, or none; here SDPA stands for it."""
    given = []

    def attend(module, query, key, value, mask, **kwargs):
        given.append(None if mask is None else mask.shape)
        assert mask is None or mask.shape == (len(key), key.shape[2])
        place = torch.arange(key.shape[2])
        seen = place[None] <= place[-query.shape[2] :, None]
        if kwargs.get("sliding_window"):
            seen = seen & (place[None] > place[-query.shape[2] :, None] - kwargs["sliding_window"])
        seen = seen[None, None] if mask is None else seen[None, None] & mask[:, None, None].bool()
        kwargs.pop("sliding_window", None)
        return sdpa_attention_forward(module, query, key, value, seen, **kwargs)

    AttentionInterface.register("padding_only", attend)
    AttentionMaskInterface.register("padding_only", flash_attention_mask)
    model, ids = model_of(kind), random_ids(batch=2, length=21)
    padded, mask = left_pad([random_ids(length=length)[0] for length in (21, 9)])
    expected = [
        logits(model, ids, logits_to_keep=rows),
        logits(model, padded, attention_mask=mask, logits_to_keep=rows),
    ]
    model.set_attn_implementation("padding_only")
    close(logits(model, ids, logits_to_keep=rows), expected[0])
    assert set(given) == {None}
    close(logits(model, padded, attention_mask=mask, logits_to_keep=rows), expected[1])
    assert set(given) == {None, (2, 21)}


def test_what_is_inside_is_of_all_positions():
    model, ids = model_of("window", self_decoder_chunk_size=4), random_ids(length=9)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        found = model(ids, logits_to_keep=1, output_hidden_states=True, output_attentions=True)
    assert [hidden.shape[1] for hidden in found.hidden_states] == [9] * (len(model.model.layers) + 1)
    assert [weights.shape[2] for weights in found.attentions] == [9] * len(model.model.layers)


# the cache


SIZES = [(4, None, 2), (6, 2, 6), (6, 4, 1), (2, None, 3)]


@every_kind
@pytest.mark.parametrize(("layers", "below", "kv_heads"), SIZES)
@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_bytes_are_the_papers_arithmetic(kind, layers, below, kv_heads, tokens):
    model = model_of(kind, num_hidden_layers=layers, num_self_decoder_layers=below, num_key_value_heads=kv_heads)
    below = below or layers // 2
    patch_model(model, None)
    cache = new_cache(model)
    logits(model, random_ids(batch=3, length=tokens), past_key_values=cache)
    heads, dim, size = 6, 8, 4
    per_token = 2 * kv_heads * dim * size
    # a window of C holds the C - 1 tokens that the next one can see beside itself, one fewer than the paper's buffer
    state = heads * dim**2 * size if kind == "retention" else 2 * heads * dim * size * min(tokens, 8 - 1)
    assert live_bytes(cache) == report(cache).bytes == 3 * (tokens * per_token + below * state)


def test_the_3b_model_has_the_published_bytes():
    config = YocoConfig()
    assert config.kv_bytes_per_token == 4096
    assert 26 * config.kv_bytes_per_token == 106_496
    # states are sums over all tokens, and held in float32
    assert config.state_bytes == 13 * 24 * 128**2 * 4


@pytest.mark.parametrize(("kind", "method"), [("retention", "unpatched"), ("retention", "none"), ("window", "none")])
def test_bytes_in_16_bit_are_those_of_the_configuration(kind, method):
    model = patched_or_not(kind, method).bfloat16()
    with torch.no_grad():
        cache = model(random_ids(batch=1, length=40)).past_key_values
    config = model.config
    # of a window the token that leaves next is gone already
    gone = 0 if kind == "retention" else config.state_bytes // config.sliding_window
    assert live_bytes(cache) == 40 * config.kv_bytes_per_token + config.state_bytes - gone


@every_kind
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("turboquant", {}),
        ("offload", {}),
        ("h2o", {"budget": 10}),
        ("adakv+criticalkv+turboquant", {"budget": 10, "window": 4}),
        ("kvzip", {"budget": 0.5, "instructions": ((3, 4), (5, 6))}),
    ],
)
def test_methods_compose(kind, method, options):
    model = patch_model(model_of(kind), method, **options)
    rows = [random_ids(length=length, seed=length)[0] for length in (23, 18)]
    ids, mask = left_pad(rows)
    batch = greedy(model, ids, attention_mask=mask, tokens=6)
    for index, row in enumerate(rows):
        assert torch.equal(greedy(model, row[None], tokens=6)[0], batch[index])


def test_eviction_takes_bytes_of_the_shared_kv():
    sizes = []
    for method, options in ((None, {}), ("snapkv", {"budget": 0.25, "window": 4})):
        model = patch_model(model_of("retention"), method, **options)
        with torch.no_grad():
            sizes.append(report(model(random_ids(length=40)).past_key_values).layers[2].bytes)
    assert sizes[1] < 0.35 * sizes[0]


@every_kind
def test_saved_cache_continues(kind, tmp_path):
    from hf_kvcache import load_cache

    model, ids = patch_model(model_of(kind), None), random_ids(batch=2, length=15)
    with torch.no_grad():
        cache = model(ids).past_key_values
        cache.save(tmp_path / "cache.safetensors")
        again = load_cache(model, tmp_path / "cache.safetensors")
        copied = copy.deepcopy(cache)
    expected = greedy_by_forward(model, ids[:, -1:], cache=cache)
    assert torch.equal(greedy_by_forward(model, ids[:, -1:], cache=again), expected)
    assert torch.equal(greedy_by_forward(model, ids[:, -1:], cache=copied), expected)


# training, saving, loading


@every_kind
def test_gradients_reach_every_weight_also_with_checkpointing(kind):
    ids, found = random_ids(batch=2, length=19), []
    for checkpointing in (False, True):
        for method in ("unpatched", "none"):
            model = patched_or_not(kind, method).train()
            if checkpointing:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model(ids, labels=ids).loss.backward()
            found.append({name: weight.grad for name, weight in model.named_parameters()})
    for name, grad in found[0].items():
        assert grad is not None and bool(grad.abs().sum() > 0), name
        for other in found[1:]:
            torch.testing.assert_close(other[name], grad, rtol=1e-4, atol=1e-6)


@every_kind
def test_saved_and_loaded_by_the_auto_classes(kind, tmp_path):
    model, ids = model_of(kind), random_ids(batch=2, length=12)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is YocoForCausalLM and isinstance(AutoConfig.from_pretrained(tmp_path), YocoConfig)
    assert torch.equal(logits(loaded, ids), logits(model, ids))


def test_tied_weights_and_the_bare_decoder_are_loaded(tmp_path):
    model, ids = model_of("retention", tie_word_embeddings=True), random_ids(length=12)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path), ids), logits(model, ids))
    with torch.no_grad():
        found = AutoModel.from_pretrained(tmp_path)(ids).last_hidden_state
        assert torch.equal(found, model.model(ids).last_hidden_state)


@torch.no_grad()
def test_initialisation_is_the_authors():
    model = YocoForCausalLM(YocoConfig(**small(hidden_size=256, head_dim=64)))
    attention = model.model.layers[0].self_attn
    # Xavier with gain g: variance 2 g^2 / (in + out)
    assert float(attention.q_proj.weight.std()) == pytest.approx(2**-2.5 / 256**0.5, rel=0.05)
    assert float(attention.o_proj.weight.std()) == pytest.approx(2**-1 / 256**0.5, rel=0.05)
    assert float(model.model.embed_tokens.weight.std()) == pytest.approx(256**-0.5, rel=0.05)


class Texts(torch.utils.data.Dataset):
    def __init__(self, labels: bool) -> None:
        self.names = ("input_ids", "labels") if labels else ("input_ids",)

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int):
        return dict.fromkeys(self.names, random_ids(length=12, seed=index)[0])


def trained(model, folder, labels=True, **options):
    arguments = TrainingArguments(
        folder, max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True, save_steps=1, **options
    )
    trainer = Trainer(model, arguments, train_dataset=Texts(labels))
    trainer.train()
    return trainer


def test_the_trainer_trains_it_and_checkpoints(tmp_path):
    model = model_of("retention")
    before = copy.deepcopy(model.state_dict())
    trained(model, tmp_path)
    assert any(not torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


# bad input


def small(**changes):
    return {
        "vocab_size": 97,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        **changes,
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 5}, "odd.*num_self_decoder_layers"),
        ({"num_self_decoder_layers": 0}, "between 1 and 3"),
        ({"num_self_decoder_layers": 4}, "between 1 and 3"),
        ({"self_decoder": "mamba"}, "retention, window"),
        ({"self_decoder": "window", "sliding_window": 129}, "longer than the context"),
        ({"self_decoder": "window", "sliding_window": 1}, "at least 2"),
        ({"num_key_value_heads": 3}, "multiple of num_key_value_heads"),
        ({"hidden_size": 50}, "give head_dim"),
    ],
)
def test_impossible_configurations_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        YocoConfig(**small(**changes))


def test_odd_depth_is_possible_when_said_how():
    config = YocoConfig(**small(num_hidden_layers=5, num_self_decoder_layers=3))
    assert config.source_layers == (0, 1, 2, 3, 3)


def test_weights_of_another_configuration_are_refused(tmp_path):
    model_of("retention").save_pretrained(tmp_path)
    other = model_of("window").config
    with pytest.raises(ValueError, match="weights are of another configuration than self_decoder='window'"):
        YocoForCausalLM.from_pretrained(tmp_path, config=other)
    with pytest.raises(RuntimeError, match="decay_proj"):
        model_of("window").load_state_dict(model_of("retention").state_dict())


def test_training_without_labels_is_refused(tmp_path):
    with pytest.raises(ValueError, match="did not return a loss"):
        trained(model_of("retention"), tmp_path, labels=False)


def test_a_state_cannot_be_rolled_back():
    model, ids = model_of("retention"), random_ids(length=10)
    with pytest.raises(ValueError, match="stateful"):
        greedy(model, ids, prompt_lookup_num_tokens=3)
    cache = new_cache(patch_model(model, None))
    logits(model, ids, past_key_values=cache)
    with pytest.raises(NotImplementedError, match="cannot forget"):
        cache.crop(-2)
    with pytest.raises(NotImplementedError, match="assisted decoding"):
        cache.activate_past_recording()


def test_windows_take_drafts_back():
    model, ids = patch_model(model_of("window"), None), random_ids(length=10).repeat(1, 2)
    assert torch.equal(greedy(model, ids, prompt_lookup_num_tokens=3), greedy(model, ids))


def test_what_the_architecture_shares_no_method_shares_again():
    for method in (KVSharer(plan=SharingPlan.identity(4)), Yoco(split=3)):
        with pytest.raises(ValueError, match="the model's own architecture"):
            patch_model(model_of("retention"), method)


def test_masks_of_other_shapes_are_refused():
    ids = random_ids(length=6)
    with pytest.raises(NotImplementedError, match="mask of padding"):
        model_of("retention")(ids, attention_mask=torch.ones(1, 1, 6, 6, dtype=torch.bool))


def test_ids_or_embeddings():
    model, ids = model_of("retention"), random_ids(length=6)
    embedded = model.get_input_embeddings()(ids)
    close(logits(model, None, inputs_embeds=embedded), logits(model, ids))
    with pytest.raises(ValueError, match="exactly one"):
        model(ids, inputs_embeds=embedded)


def test_cross_layers_own_no_key_and_value():
    model = model_of("retention")
    for layer in model.model.layers[2:]:
        names = {name for name, module in layer.self_attn.named_modules() if isinstance(module, nn.Linear)}
        assert names == {"q_proj", "o_proj"}
