"""Tuning: the prices are those of real changes, the solution is the cheapest, and a plan is verified."""

import itertools
from dataclasses import replace
from operator import attrgetter

import pytest
import torch

from hf_kvcache import new_cache, patch_model, unpatch_model
from hf_kvcache.patches.adapters import find_adapter
from hf_kvcache.planning import Tuner, Verified, measure_costs, solve
from hf_kvcache.planning.gradients import output_gradients, output_projections
from hf_kvcache.planning.solve import planned_share
from hf_kvcache.planning.tune import next_ratio
from hf_kvcache.planning.windows import Question, Window, windows
from hf_kvcache.testing import FAMILIES, tiny_model
from tests.letters import Letters
from tests.planning.made_up import random_costs, window


@torch.no_grad()
def divergence(model, window: Window, question: Question, layer: int, change: torch.Tensor) -> float:
    """KL after `change` is added to what goes into the output projection of a layer, nats a token."""
    projection = output_projections(model, find_adapter(model))[layer]

    def predicted(hook=None):
        cache = model(window.context, use_cache=True).past_key_values
        handle = projection.register_forward_pre_hook(hook) if hook else None
        logits = model(question.ids[:, :-1], past_key_values=cache).logits[0, question.first :]
        if handle:
            handle.remove()
        return logits.double().log_softmax(-1)

    full, other = predicted(), predicted(lambda module, args: (args[0] + change,))
    return float((full.exp() * (full - other)).sum(-1).mean())


@pytest.mark.parametrize("layer", [0, 3])
@pytest.mark.parametrize("asked", [0, 1])
def test_sampled_gradients_price_a_small_change(layer, asked):
    model, one = tiny_model("llama"), window()
    question = one.questions[asked]
    cache = model(one.context, use_cache=True).past_key_values
    projections = output_projections(model, find_adapter(model))
    grads = output_gradients(model, projections, cache, question.ids, 64, question.first, draws=600, seed=0)
    change = 0.003 * torch.randn(grads[layer].shape[1:], generator=torch.Generator().manual_seed(1))
    priced = float((grads[layer] * change).sum((1, 2)).square().mean() / 2)
    real = divergence(model, one, question, layer, change) * (question.ids.shape[1] - 1 - question.first)
    # 600 squares of a normal number are known to 6%
    assert priced == pytest.approx(real, rel=0.25)


def test_the_model_is_as_before():
    model, one = tiny_model("llama"), window()
    before = model(one.context).logits
    measure_costs(model, Letters(), [one], "knorm", draws=2, kept=(1.0, 0.5), widths=((8, 8), (2, 2)))
    assert torch.equal(model(one.context).logits, before)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_prices_follow_what_is_lost():
    costs = measure_costs(
        tiny_model("llama"),
        Letters(),
        [window(), window(seed=1)],
        "knorm",
        8,
        (1.0, 0.5, 0.1),
        ((8, 8), (4, 4), (2, 2)),
    )
    assert costs.loss.shape == (4, 3, 3, 2)
    assert bool((costs.loss.diff(dim=2) >= 0).all()), "more dropped, more lost"
    by_width = costs.loss[:, :, 0].sum((0, 2))
    assert by_width[0] < by_width[1] < by_width[2]
    assert bool((costs.entry_bytes.diff(dim=1) < 0).all())
    assert costs.full_bytes.tolist() == [2 * (8 + 8)] * 4


def has_full_attention(model) -> bool:
    found = bool(new_cache(patch_model(model)).spec.evicting)
    unpatch_model(model)
    return found


@pytest.mark.parametrize("family", [*FAMILIES, "yoco"])
def test_every_family_can_be_measured(family):
    model = tiny_model(family)
    widths = ((8, 8), (4, 4))
    if not has_full_attention(model):
        with pytest.raises(ValueError, match="sliding window"):
            measure_costs(model, Letters(), [window()], "knorm", draws=1, kept=(1.0, 0.5), widths=widths)
        return
    costs = measure_costs(model, Letters(), [window()], "knorm", draws=1, kept=(1.0, 0.5), widths=widths)
    assert len(costs.layers) == costs.loss.shape[0] and bool(costs.loss.isfinite().all())
    assert bool((costs.loss[:, 0, 1] > 0).any())


@pytest.mark.parametrize("silent", [2, 3])
def test_an_owner_is_priced_for_all_layers_that_read_it_by_design(silent):
    def loss(early_exit: bool, *unheard: int) -> torch.Tensor:
        model = tiny_model("yoco", early_exit=early_exit)
        for layer in unheard:
            torch.nn.init.zeros_(model.model.layers[layer].self_attn.o_proj.weight)
        return measure_costs(model, Letters(), [window()], "knorm", 2, (1.0, 0.5), ((4, 4),)).loss

    # layer 3 reads what layer 2 stores
    heard = loss(False, silent)
    assert heard.shape == (1, 1, 2, 2) and bool((heard > 0).all())
    assert bool((loss(False, 2, 3) == 0).all())
    torch.testing.assert_close(loss(True, silent), heard)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("ratio", [2.5, 4.0, 7.0])
def test_no_plan_on_the_lower_hull_is_cheaper(seed, ratio):
    costs = random_costs(seed=seed)
    plan, expected = solve(costs, ratio)
    allowed = 256 * 4 / ratio

    def weigh(width, kept) -> tuple[float, float]:
        held = 0.0
        chosen = [(layer, width[layer], kept[2 * layer + head], head) for layer in (0, 1) for head in (0, 1)]
        for layer, w, k, _ in chosen:
            # where one head of a layer drops something, all have to say which columns they hold
            columns = 4 if any(kept[2 * layer : 2 * layer + 2]) else 0
            held += (float(costs.entry_bytes[layer, w]) + columns) * costs.kept[k]
        return held, sum(float(costs.loss[layer, w, k, head]) for layer, w, k, head in chosen)

    width = [costs.widths.index(tuple(pair)) for pair in plan.bits.tolist()]
    kept = [min(range(3), key=lambda place: abs(costs.kept[place] - share)) for share in plan.kept.flatten().tolist()]
    held, lost = weigh(width, kept)
    assert held <= allowed * 1.0001 and lost == pytest.approx(expected, rel=1e-5)
    assert planned_share(costs, plan) == pytest.approx(held / (256 * 4))
    every = [
        weigh(widths, shares)
        for widths in itertools.product(range(2), repeat=2)
        for shares in itertools.product(range(3), repeat=4)
    ]
    # Lagrange finds the best of the bytes that it uses; what it leaves over is at most one step
    assert lost <= min(other for bytes_, other in every if bytes_ <= held * 0.999 + 1e-9) + 1e-6


def test_bytes_left_over_buy_a_share_beyond_one_that_gains_nothing():
    # two heads alike, for which more than a third of the tokens is of use only where it is all of them
    loss = torch.tensor([[9.0, 9.0, 9.0], [0.1, 0.9, 0.9]])[None, ..., None].expand(1, 2, 3, 2)
    plan, expected = solve(replace(random_costs(layers=1), loss=loss), ratio=512 / 100)
    # 72 bytes a token for one, 21.6 for the other; 136 for both
    assert sorted(plan.kept[0].tolist()) == pytest.approx([0.3, 1.0]) and expected == pytest.approx(1.0)


def test_what_is_out_of_reach_is_refused():
    with pytest.raises(ValueError, match="ask for less"):
        solve(random_costs(), 40.0)


def test_a_plan_is_measured_solved_and_verified():
    model = tiny_model("llama")
    text = "".join(chr(33 + (index * index + 3 * index) % 90) for index in range(9000))
    tuner = Tuner(model, Letters(), [text], scorer="knorm", samples=4, length=256, draws=4)
    assert len(tuner.measured) == 4 and len(tuner.held) == 2
    found = tuner.tune(6)
    assert found.verified.ratio == pytest.approx(6, rel=0.05)
    assert found.plan.settings["target_ratio"] == "6" and found.plan.fingerprint == tuner.fingerprint
    assert found.verified.loss < found.uniform.loss
    # the sum of the prices is of the size of what is really lost
    assert 0.3 < found.expected / found.verified.loss < 3
    patch_model(model, plan=found.plan)


def test_a_patched_model_is_not_measured():
    with pytest.raises(ValueError, match="untouched model"):
        Tuner(patch_model(tiny_model("llama")), Letters(), ["x" * 9000])


@pytest.mark.parametrize("name", ["samples", "length", "draws"])
def test_counts_are_checked(name):
    with pytest.raises(ValueError, match=f"{name} must be a positive int"):
        Tuner(tiny_model("llama"), Letters(), ["x" * 9000], **{name: 0})


@pytest.mark.parametrize("scorer", ["nonsense", "turboquant", "adakv", "planned"])
def test_a_scorer_is_checked_before_anything_is_measured(scorer):
    with pytest.raises(ValueError, match=rf"scorer must be one of the methods .*snapkv.*, got '{scorer}'"):
        Tuner(tiny_model("llama"), Letters(), ["x" * 9000], scorer=scorer)


@pytest.fixture
def tuner(monkeypatch):
    """One that has measured, of a model that holds something which no plan shrinks."""
    text = "".join(chr(33 + index % 89) for index in range(5000))
    tuner = Tuner(tiny_model("llama"), Letters(), [text], scorer="knorm", samples=2, length=256)
    tuner._costs, tuner.pairs = random_costs(), []
    monkeypatch.setattr(tuner, "unmeasured", lambda ratio: Verified(0.0, 0.0, 1.0))
    return tuner


def test_a_ratio_out_of_reach_is_named_as_it_was_asked(tuner, monkeypatch):
    monkeypatch.setattr(tuner, "verify", lambda plan: Verified(0.0, 0.0, 2.5))
    with pytest.raises(ValueError, match=r"target_ratio=5 is out of reach: .* tried was 2.50 times smaller"):
        tuner.tune(5)


def test_a_plan_that_misses_its_ratio_says_so(tuner, monkeypatch, caplog):
    monkeypatch.setattr(tuner, "verify", lambda plan: Verified(0.0, 0.0, 3.9))
    assert tuner.tune(4).verified.ratio == 3.9
    assert "target_ratio=4 was not reached: the plan makes a cache 3.90 times smaller" in caplog.text


@pytest.mark.parametrize("fixed", [0.0, 0.05, 0.09])
@pytest.mark.parametrize("part", [0.3, 0.8, 1.0])
def test_two_plans_tell_what_no_plan_shrinks(fixed, part):
    target, held = 8.0, []
    planned = 1 / target
    for _ in range(2):
        held.append((planned, fixed + part * planned))
        planned = 1 / next_ratio(target, held)
    assert 1 / (fixed + part * planned) == pytest.approx(target, rel=0.003)


def test_a_ratio_below_what_no_plan_shrinks_is_not_asked_for():
    with pytest.raises(ValueError, match="ask for less"):
        next_ratio(8.0, [(0.1, 0.23)])


@pytest.mark.parametrize("ratio", [3.0, 3.4])
def test_a_ratio_is_reached_where_a_part_stays_as_it_is(ratio, caplog):
    model = tiny_model("ministral", sliding_window=64)
    text = "".join(chr(33 + (index * index + 3 * index) % 90) for index in range(9000))
    options = {"scorer": "knorm", "samples": 2, "length": 256, "draws": 2, "sharing": False}
    assert Tuner(model, Letters(), [text], **options).tune(ratio).verified.ratio >= 0.997 * ratio
    assert "not reached" not in caplog.text


def test_windows_do_not_repeat_and_quote_what_they_hold():
    found = windows(tiny_model("llama"), Letters(), ["".join(chr(33 + i % 89) for i in range(5000))], 5, 300, 20)
    for one in found:
        quoted = one.questions[1].ids[0, 2:].tolist()
        context = one.context[0].tolist()
        assert any(context[start : start + len(quoted)] == quoted for start in range(len(context)))
        assert one.questions[1].first == 18 and one.questions[0].ids.shape == (1, 20)
    assert attrgetter("context.shape")(found[0]) == (1, 300)
