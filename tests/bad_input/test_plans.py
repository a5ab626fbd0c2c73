"""Plans that do not fit the model, files that hold none, and calibration without what it needs are refused."""

import pytest
import torch

from hf_kvcache import KVSharer, SharingPlan, is_patched, patch_model
from hf_kvcache.fingerprint import fingerprint
from hf_kvcache.testing import tiny_model
from tests.bad_input.refusals import refused


def test_plan_of_another_model(model):
    plan = SharingPlan((0, 0, 2, 2), fingerprint=fingerprint(tiny_model("llama", seed=1)))
    with refused(ValueError, "was made for the model", fingerprint(model), "calibrate a plan", model=model):
        patch_model(model, "kvsharer", plan=plan)
    assert is_patched(patch_model(model, "kvsharer", plan=SharingPlan((0, 0, 2, 2), fingerprint=fingerprint(model))))


@pytest.mark.parametrize("depth", [3, 5])
def test_plan_of_another_depth(model, depth):
    with refused(ValueError, f"{depth} layers", "has 4", "calibrate a plan", model=model):
        patch_model(model, "kvsharer", plan=SharingPlan((0,) * depth))


def test_plan_across_layer_types():
    gemma = tiny_model("gemma2")
    with refused(ValueError, "layer 1", "window None", "layer 0", "window 8", "one layer type", model=gemma):
        patch_model(gemma, "kvsharer", plan=SharingPlan((0, 0, 2, 3)))


@pytest.mark.parametrize(
    ("source_layers", "words"),
    [
        ((1, 0, 2, 3), ("layer 0 reads layer 1", "earlier layer", "swap the pair")),
        ((0, 0, 1, 3), ("layer 2 reads layer 1", "reads layer 0 itself", "resolve the chain")),
        ((0, 1, 2, 4), ("source_layers[3]", "below 4", "got 4")),
        ((0, -1, 2, 3), ("source_layers[1]", "got -1")),
    ],
    ids=["cycle", "unresolved", "beyond", "negative"],
)
def test_plan_that_is_no_map(source_layers, words):
    with refused(ValueError, *words):
        SharingPlan(source_layers)


@pytest.mark.parametrize("pair", [(0, 1), (2, 2), (4, 0), (1, -1)], ids=str)
def test_pair_that_cannot_share(pair):
    with refused(ValueError, "(consumer, source)", "0 <= source < consumer < 4", f"got {pair}"):
        SharingPlan.from_pairs(4, [pair])


def test_plan_that_heals_what_is_no_linear(model):
    plan = SharingPlan((0, 0, 2, 2), healed={"layers.1.input_layernorm": torch.ones(48, 48)})
    with refused(NotImplementedError, "layers.1.input_layernorm", "LlamaRMSNorm", "heal=False", model=model):
        patch_model(model, "kvsharer", plan=plan)


def test_plan_that_heals_with_another_shape(model):
    plan = SharingPlan((0, 0, 2, 2), healed={"layers.1.self_attn.o_proj": torch.ones(48, 49)})
    with refused(ValueError, "layers.1.self_attn.o_proj", "(48, 49)", "(48, 48)", "calibrate", model=model):
        patch_model(model, "kvsharer", plan=plan)


def test_plan_that_heals_what_is_not_there(model):
    plan = SharingPlan((0, 0, 2, 2), healed={"layers.1.self_attn.w_o": torch.ones(48, 48)})
    with refused((ValueError, NotImplementedError, AttributeError), "w_o", model=model):
        patch_model(model, "kvsharer", plan=plan)


def test_plan_file_that_is_missing(model, tmp_path):
    with refused(FileNotFoundError, "missing.safetensors", "calibrate", model=model):
        patch_model(model, "kvsharer", plan=tmp_path / "missing.safetensors")


@pytest.mark.parametrize("kept", [0, 5, 60, -1])
def test_plan_file_that_is_truncated(model, tmp_path, kept):
    path = tmp_path / "plan.safetensors"
    SharingPlan((0, 0, 2, 2), healed={"layers.1.self_attn.o_proj": torch.eye(48)}).save(path)
    path.write_bytes(path.read_bytes()[:kept])
    with refused(ValueError, str(path), "calibrate", model=model):
        patch_model(model, "kvsharer", plan=path)


def test_plan_file_that_is_something_else(model, tmp_path):
    from safetensors.torch import save_file

    weights = tmp_path / "model.safetensors"
    save_file({"weight": torch.ones(3)}, weights)
    with refused(ValueError, str(weights), "format", "sharing_plan", "calibrate", model=model):
        patch_model(model, "kvsharer", plan=weights)
    text = tmp_path / "plan.json"
    text.write_text('{"source_layers": [0, 0, 2, 2]}' * 9)
    with refused(ValueError, str(text), "calibrate", model=model):
        patch_model(model, "kvsharer", plan=str(text))
    with refused((ValueError, OSError), str(tmp_path), model=model):
        patch_model(model, "kvsharer", plan=tmp_path)


# calibration


def test_calibration_text_that_is_too_short(model):
    tokenizer = lambda text, **_: {"input_ids": [3] * 100}  # noqa: E731
    words = ("too short", "30 windows of 64 tokens", "got 1 (100 tokens)", "give more text")
    with refused(ValueError, *words, model=model):
        patch_model(model, KVSharer(calibration=["a short text"]), tokenizer=tokenizer)


def test_calibration_without_a_tokenizer(model):
    with refused(ValueError, "needs a tokenizer", "tokenizer=", "[N, T]", "plan", model=model):
        patch_model(model, "kvsharer")


def test_calibration_file_that_is_missing(model, tmp_path):
    tokenizer = lambda text, **_: {"input_ids": [3] * 100}  # noqa: E731
    with refused(FileNotFoundError, "calibration", "nowhere.txt", model=model):
        patch_model(model, "kvsharer", calibration=str(tmp_path / "nowhere.txt"), tokenizer=tokenizer)


def test_calibration_without_texts(model):
    tokenizer = lambda text, **_: {"input_ids": [3] * 100}  # noqa: E731
    with refused(ValueError, "too short", "got 0", model=model):
        patch_model(model, KVSharer(calibration=[]), tokenizer=tokenizer)
