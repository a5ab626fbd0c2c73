"""The original YOCO is trained, checkpointed, saved and loaded as every transformers model."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, Trainer, TrainingArguments

from hf_kvcache.kernels.gated_retention import gated_retention
from hf_kvcache.models import YocoConfig, YocoForCausalLM
from hf_kvcache.models.yoco import mixers
from hf_kvcache.testing import left_pad, random_ids
from tests.forward import logits
from tests.models.yoco import every_kind, model_of, patched_or_not


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


def test_in_mixed_precision_retention_is_given_one_dtype(monkeypatch):
    """Others have no kernel; the projections are in 16 bits and RoPE in float32."""
    given = []

    def spy(*tensors, **options):
        given.append({tensor.dtype for tensor in tensors[:3]})
        return gated_retention(*tensors, **options)

    monkeypatch.setattr(mixers, "gated_retention", spy)
    ids, mask = left_pad([random_ids(length=length)[0] for length in (19, 7)])
    with torch.autocast("cpu", torch.bfloat16):
        model_of("retention").train()(ids, attention_mask=mask.float(), labels=ids).loss.backward()
    assert given == [{torch.bfloat16}] * 2


@every_kind
def test_the_gradient_behind_a_cache_is_that_of_a_full_pass(kind):
    model, ids = model_of(kind), random_ids(batch=2, length=24)
    embedded = model.get_input_embeddings()(ids).detach()

    def gradient(cached: bool) -> torch.Tensor:
        last = embedded[:, 16:].clone().requires_grad_()
        if cached:
            with torch.no_grad():
                cache = model(ids[:, :16], use_cache=True).past_key_values
            found = model(inputs_embeds=last, past_key_values=cache).logits
        else:
            found = model(inputs_embeds=torch.cat([embedded[:, :16], last], 1), use_cache=False).logits[:, 16:]
        return torch.autograd.grad(found.square().sum(), last)[0]

    expected = gradient(False)
    assert float((gradient(True) - expected).abs().max()) < 1e-4 * float(expected.abs().max())


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


def test_weights_of_another_configuration_are_refused(tmp_path):
    model_of("retention").save_pretrained(tmp_path)
    other = model_of("window").config
    with pytest.raises(ValueError, match="weights are of another configuration than self_decoder='window'"):
        YocoForCausalLM.from_pretrained(tmp_path, config=other)
    with pytest.raises(RuntimeError, match="decay_proj"):
        model_of("window").load_state_dict(model_of("retention").state_dict())


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


def test_training_without_labels_is_refused(tmp_path):
    with pytest.raises(ValueError, match="did not return a loss"):
        trained(model_of("retention"), tmp_path, labels=False)
