"""A plan of yoco is saved, loaded, trained and resumed as a part of the model, and refused where it does not fit."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from hf_kvcache import Yoco, patch_model
from hf_kvcache.attention import NAMES
from hf_kvcache.models import SharedForCausalLM
from hf_kvcache.patches.attach import require_attached
from hf_kvcache.patches.saving import add_plan
from hf_kvcache.spec import LayerKind
from hf_kvcache.testing import greedy, random_ids
from tests.forward import logits
from tests.methods.yoco import fresh, patched, residual_names, shake


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


@pytest.fixture
def saved(tmp_path):
    """A model saved with its plan, and the same one without."""
    shake(patched()).save_pretrained(tmp_path / "shared")
    fresh().save_pretrained(tmp_path / "plain")
    return tmp_path / "shared", tmp_path / "plain"


@pytest.mark.parametrize("load", [AutoModelForCausalLM.from_pretrained, SharedForCausalLM.from_pretrained])
@pytest.mark.parametrize("attention", [None, "sdpa", "eager"])
def test_the_attention_asked_for_is_used(load, attention, saved):
    options = {} if attention is None else {"attn_implementation": attention}
    assert require_attached(load(saved[0], **options)).name == NAMES[attention or "sdpa"]


OPTIONS = [
    {"use_cache": False},
    {"rms_norm_eps": 0.5},
    {"attention_dropout": 0.1, "use_cache": False},
    {"output_hidden_states": True},
    {"pad_token_id": 3},
    {"dtype": torch.bfloat16, "use_cache": False},
    {"dtype": "auto"},
]


@pytest.mark.parametrize("load", [AutoModelForCausalLM.from_pretrained, SharedForCausalLM.from_pretrained])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options_go_where_they_would_without_a_plan(load, options, saved):
    model, plain = load(saved[0], **options), AutoModelForCausalLM.from_pretrained(saved[1], **options)
    for name in {*options, "dtype"}:
        assert getattr(model.config, name) == getattr(plain.config, name), name
    assert model.dtype == plain.dtype


def test_an_unknown_option_is_refused(saved):
    with pytest.raises(TypeError, match="no_such_option"):
        AutoModelForCausalLM.from_pretrained(saved[0], no_such_option=1)


class Hub:
    """What transformers calls of the hub; remembers the files it was sent."""

    def __init__(self):
        self.sent = {}

    def create_repo(self, repo_id, **options):
        return SimpleNamespace(repo_id=repo_id)

    def create_commit(self, operations, **options):
        self.sent |= {operation.path_in_repo: Path(operation.path_or_fileobj).read_bytes() for operation in operations}


@pytest.mark.parametrize("call", ["save_pretrained", "push_to_hub"])
def test_the_copy_on_the_hub_has_the_plan(call, tmp_path, monkeypatch):
    hub = Hub()
    for module in (transformers.modeling_utils, transformers.utils.hub):
        monkeypatch.setattr(module, "hf_api", lambda: hub)
        monkeypatch.setattr(module, "create_and_tag_model_card", lambda *args, **kwargs: MagicMock())
    model = shake(patched())
    if call == "push_to_hub":
        model.push_to_hub("somebody/some-model")
    else:
        model.save_pretrained(tmp_path / "here", push_to_hub=True, repo_id="somebody/some-model", commit_message="new")
        same(model, AutoModelForCausalLM.from_pretrained(tmp_path / "here"))
    (tmp_path / "there").mkdir()
    for name, content in hub.sent.items():
        (tmp_path / "there" / name).write_bytes(content)
    same(model, AutoModelForCausalLM.from_pretrained(tmp_path / "there"))


def test_only_the_process_that_saves_writes_the_configuration(tmp_path):
    model = shake(patched())
    model.save_pretrained(tmp_path, is_main_process=False)
    assert not (tmp_path / "config.json").exists()
    model.save_pretrained(save_directory=tmp_path)
    written = (tmp_path / "config.json").read_bytes()
    model.save_pretrained(tmp_path, is_main_process=False)
    assert (tmp_path / "config.json").read_bytes() == written
    same(model, AutoModelForCausalLM.from_pretrained(tmp_path))


def test_a_plan_is_added_once(tmp_path):
    model = patched()
    model.save_pretrained(tmp_path)
    written = (tmp_path / "config.json").read_bytes()
    add_plan(require_attached(model).spec.sharing, tmp_path)
    assert (tmp_path / "config.json").read_bytes() == written


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
        Yoco().plan((LayerKind(None),) * 4).save(tmp_path / "plan.safetensors")
