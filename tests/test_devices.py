"""Models whose weights are elsewhere and are brought in to be used are measured and scored as those in memory."""

import pytest
import torch

from hf_kvcache import patch_model
from hf_kvcache.api import make_probe
from hf_kvcache.devices import input_device
from hf_kvcache.evaluation.protocol import context_ids
from hf_kvcache.integrations.scoring import ScoredText, score_texts
from hf_kvcache.planning import Tuner
from hf_kvcache.testing import random_ids, tiny_model
from tests.letters import Letters

accelerate = pytest.importorskip("accelerate")
CPU = torch.device("cpu")
IDS = random_ids(1, 40)
TEXT = "".join(chr(33 + (index * index + 3 * index) % 90) for index in range(9000))


@pytest.fixture
def offloaded():
    return accelerate.cpu_offload(tiny_model("llama"), execution_device=CPU)


def test_token_ids_go_where_the_embedding_computes(offloaded):
    assert input_device(tiny_model("llama")) == CPU and input_device(tiny_model("llama").to("meta")).type == "meta"
    assert offloaded.device.type == "meta" and input_device(offloaded) == CPU
    assert context_ids(offloaded, Letters(), "some text").device == CPU
    # hooks that stand one behind the other, and one around the embedding only
    accelerate.hooks.add_hook_to_module(offloaded.get_input_embeddings(), accelerate.hooks.ModelHook(), append=True)
    assert input_device(offloaded) == CPU
    around = tiny_model("llama").to("meta")
    accelerate.hooks.add_hook_to_module(around.model, accelerate.hooks.AlignDevicesHook(execution_device="cpu"))
    assert input_device(around) == CPU


def test_texts_are_scored(offloaded):
    texts = [ScoredText(tuple(IDS[0].tolist()), 20, 21)]
    expected = score_texts(patch_model(tiny_model("llama"), "knorm", budget=0.5), texts)
    assert score_texts(patch_model(offloaded, "knorm", budget=0.5), texts) == expected


def test_calibration_texts_are_read(offloaded):
    found, expected = make_probe(offloaded, None), make_probe(tiny_model("llama"), None)
    for probe in (found, expected):
        probe.use_texts(IDS, 1, 40)
    assert torch.equal(found.untouched.final, expected.untouched.final)


def test_a_plan_is_measured(offloaded):
    options = {"scorer": "knorm", "samples": 4, "length": 256, "draws": 1}
    tuner = Tuner(offloaded, Letters(), [TEXT], **options)
    expected = Tuner(tiny_model("llama"), Letters(), [TEXT], **options, sharing=False).tune(6)
    found = tuner.tune(6)
    # what is not in memory cannot be healed, so no layer shares
    assert found.plan.sharing is None and torch.equal(found.plan.kept, expected.plan.kept)
    assert found.verified == expected.verified
