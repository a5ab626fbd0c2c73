"""The share map of a plan: layers share where that is cheaper than what else could be given up, and only there."""

import pytest
import torch

from hf_kvcache import patch_model
from hf_kvcache.plan import CachePlan
from hf_kvcache.planning import Pair, Sharing, Tuner, Verified, fold, solve, solve_shared
from hf_kvcache.sharing import SharingPlan
from hf_kvcache.testing import random_ids, tiny_model
from tests.letters import Letters
from tests.planning.made_up import random_costs

TEXT = "".join(chr(33 + (index * index + 3 * index) % 90) for index in range(9000))
PAIRS = [Pair(3, 2, 0.001), Pair(2, 1, 0.002), Pair(1, 0, 50.0)]


class Doubled(torch.nn.Module):
    """A projection whose weight cannot be replaced, as an adapter's or a quantised one."""

    def __init__(self, inner: torch.nn.Linear) -> None:
        super().__init__()
        self.inner = inner

    @property
    def weight(self) -> torch.Tensor:
        return self.inner.weight

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return 2 * self.inner(hidden)


def test_an_owner_answers_for_its_readers():
    costs = random_costs(layers=4)
    folded = fold(costs, SharingPlan((0, 1, 1, 1)))
    assert folded.layers == (0, 1)
    assert torch.equal(folded.loss[0], costs.loss[0])
    assert torch.allclose(folded.loss[1], costs.loss[1:].sum(0))
    assert folded.full_bytes.tolist() == [256, 768] and folded.entry_bytes.tolist() == [[132, 68]] * 2


def test_nothing_is_folded_where_nothing_is_shared():
    costs = random_costs(layers=4)
    folded = fold(costs, SharingPlan.identity(4))
    assert torch.equal(folded.loss, costs.loss) and folded.layers == costs.layers


def test_cheap_pairs_are_taken_and_dear_ones_are_not():
    costs = random_costs(layers=4)
    plan, expected = solve_shared(costs, PAIRS, 6.0)
    # 2 <- 1 would take the source of 3 away, and 1 <- 0 costs more than all the rest
    assert plan.sharing.source_layers == (0, 1, 2, 2)
    folded, alone = solve(fold(costs, plan.sharing), 6.0)
    assert expected == pytest.approx(alone + 0.001) and expected < solve(costs, 6.0)[1]
    assert torch.equal(plan.kept, folded.kept)


def test_no_pair_is_taken_that_does_not_pay():
    costs = random_costs(layers=4)
    plan, expected = solve_shared(costs, [Pair(3, 2, 50.0)], 6.0)
    assert plan.sharing is None and expected == solve(costs, 6.0)[1]


def test_sharing_reaches_what_nothing_else_does():
    costs = random_costs(layers=4)
    with pytest.raises(ValueError, match="ask for less"):
        solve(costs, 12.5)
    plan, _ = solve_shared(costs, [Pair(3, 2, 50.0)], 12.5)
    assert plan.sharing.consumers == (3,)
    with pytest.raises(ValueError, match="ask for less"):
        solve_shared(costs, [Pair(3, 2, 50.0)], 40.0)


def tuner_of(model, **options) -> Tuner:
    return Tuner(model, Letters(), [TEXT], scorer="knorm", samples=4, length=256, draws=2, **options)


@pytest.fixture
def model():
    """One whose layer 2 does not listen to its attention."""
    model = tiny_model("llama")
    torch.nn.init.zeros_(model.model.layers[2].self_attn.o_proj.weight)
    return model


def test_a_layer_that_is_not_listened_to_shares(model, tmp_path):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = tuner_of(model).tune(6)
    assert found.plan.sharing.source_layers == (0, 1, 1, 3)
    assert "shared layers 2<-1" in found.plan.summary()
    assert found.verified.ratio == pytest.approx(6, rel=0.05)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    # what it no longer spends on layer 2 it spends elsewhere
    assert found.verified.loss < tuner_of(model, sharing=False).tune(6).verified.loss
    found.plan.save(tmp_path / "plan.safetensors")
    patch_model(model, plan=tmp_path / "plan.safetensors")
    assert CachePlan.load(tmp_path / "plan.safetensors").sharing.consumers == (2,)


def test_a_map_that_proves_worse_is_dropped(monkeypatch):
    tuner = tuner_of(tiny_model("llama"))
    tuner.pairs = [Pair(2, 1, 0.0)]  # a price that is not true
    seen = []

    def verify(plan: CachePlan) -> Verified:
        seen.append(plan)
        return Verified(0.1 if plan.sharing is None else 0.2, 0.0, 6.0)

    monkeypatch.setattr(tuner, "verify", verify)
    assert tuner.tune(6).plan.sharing is None
    assert [plan.sharing is None for plan in seen] == [False, True]


def test_a_map_that_misses_the_ratio_gives_way_to_a_plan_that_reaches_it(monkeypatch, caplog):
    tuner = tuner_of(tiny_model("llama"))
    tuner.pairs = [Pair(2, 1, 0.0)]
    monkeypatch.setattr(
        tuner, "verify", lambda plan: Verified(0.2, 0.0, 6.0) if plan.sharing is None else Verified(0.1, 0.0, 5.6)
    )
    assert tuner.tune(6).verified.ratio == 6.0
    assert "not reached" not in caplog.text


def test_no_pairs_are_priced_where_none_can_be():
    assert tuner_of(tiny_model("llama"), sharing=False).pairs == []
    few = Tuner(tiny_model("llama"), Letters(), [TEXT], scorer="knorm", samples=2, length=256, draws=1)
    assert few.pairs == []  # 512 tokens determine no projection


@pytest.mark.parametrize("name", ["q_proj", "o_proj"])
def test_no_layer_shares_where_one_could_not_be_healed(model, name):
    attention = model.model.layers[2].self_attn
    setattr(attention, name, Doubled(getattr(attention, name)))
    said: list[str] = []
    tuner = tuner_of(model, say=said.append)
    tuner._costs = random_costs(layers=4)
    assert tuner.pairs == [] and any(f"no layer will share: healing refits {name} of layer 2" in line for line in said)


@pytest.mark.parametrize(("rows", "length"), [(6, 250), (3, 380)])
def test_texts_that_fill_some_windows_only_heal_a_map(model, rows, length):
    sharing = Sharing(model, None, random_ids(rows, length), range(4))
    assert sharing.possible and len(sharing.price()) == 3
    plan = CachePlan.uniform(4, 2, 1.0, 8, 8, sharing=SharingPlan.from_pairs(4, [(2, 1)]))
    healed = sharing.heal(plan).sharing
    assert healed is not None and set(healed.healed) == {f"layers.2.self_attn.{name}" for name in ("q_proj", "o_proj")}
