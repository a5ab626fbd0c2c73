"""`check_laws` and the example of a method of your own: what keeps the laws passes, what breaks one is named."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from hf_kvcache.laws import check_laws
from hf_kvcache.methods import AdaKV, ScoringMethod, TurboQuant

ROOT = Path(__file__).parents[1]


def example():
    spec = importlib.util.spec_from_file_location("new_method", ROOT / "examples" / "new_method.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example_is_short_and_keeps_the_laws():
    module = example()
    source = (ROOT / "examples" / "new_method.py").read_text()
    body = source[source.index("@dataclass") : source.index("if __name__")]
    assert len(body.strip().splitlines()) < 30
    check_laws(module.LargeValues(budget=24))
    check_laws([module.LargeValues(budget=24, every=4), AdaKV(), TurboQuant(bits=8)], families=["llama"])


def test_nothing_lost_keeps_the_laws():
    check_laws(None)


@dataclass(frozen=True)
class Fickle(ScoringMethod):
    """A score that is another one every time."""

    name: ClassVar[str] = "fickle"
    paper: ClassVar[str] = "-"

    def score(self, observation):
        return torch.rand(observation.key.shape[:3])


@dataclass(frozen=True)
class ByBatch(ScoringMethod):
    """A score that depends on the other rows of the batch."""

    name: ClassVar[str] = "by-batch"
    paper: ClassVar[str] = "-"

    def score(self, observation):
        key = observation.key
        return -(key - key.mean((0, 2), keepdim=True)).norm(dim=-1) * (-1) ** len(key)


@pytest.mark.parametrize(("method", "law"), [(Fickle, "The same prompt"), (ByBatch, "A row of a batch")])
def test_a_broken_law_is_named(method, law):
    with pytest.raises(AssertionError, match=f"on llama: {law}"):
        check_laws(method(budget=16))
