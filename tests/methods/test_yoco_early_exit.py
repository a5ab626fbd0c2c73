"""Upper layers run for the positions that are asked for, and nobody can see a difference."""

import pytest
import torch

from hf_kvcache import compress
from hf_kvcache.testing import greedy, greedy_by_forward, left_pad, random_ids
from tests.forward import close, logits
from tests.methods.yoco import every_family, patched, shake


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


@pytest.mark.parametrize("use_cache", [True, False])
def test_hidden_states_are_of_all_positions(use_cache):
    model, ids = patched(method="yoco"), random_ids(length=9)
    asked = {"logits_to_keep": 1, "use_cache": use_cache}
    with torch.no_grad():
        found = model(ids, output_hidden_states=True, **asked)
    assert [hidden.shape[1] for hidden in found.hidden_states] == [9] * 5
    close(found.logits, logits(model, ids, **asked))


def test_bounds_of_packed_sequences_count_every_position():
    # those of Flash Attention, which the implementations on a CPU are given and do not read
    model, ids = patched(method="yoco"), random_ids(length=9)
    bounds = {"cu_seq_lens_q": torch.tensor([0, 9]), "cu_seq_lens_k": torch.tensor([0, 9])}
    seen = []
    model.model.layers[-1].mlp.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    logits(model, ids, logits_to_keep=1, use_cache=False, **bounds)
    assert seen == [9]


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe"])
@pytest.mark.parametrize("by", ["call", "configuration", "both"])
def test_routers_are_asked_at_all_positions(family, by):
    model, other = (patched(family, "yoco", early_exit=early) for early in (True, False))
    ids, mask = left_pad([random_ids(length=length)[0] for length in (12, 7)])
    asked = {"logits_to_keep": 1} | ({} if by == "configuration" else {"output_router_logits": by == "call" or None})
    for one in (model, other):
        one.config.output_router_logits = by != "call"
    for given in ({"attention_mask": mask}, {}):
        with torch.no_grad():
            found, expected = (one(ids, **given, **asked) for one in (model, other))
        assert [router.shape[0] for router in found.router_logits] == [ids.numel()] * 4
        close(found.aux_loss, expected.aux_loss)
    assert torch.equal(greedy(model, ids), greedy(other, ids))


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
