"""The training example, on tiny models: distillation in stages that resumes, the comparison, and its table."""

import copy
import csv
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, TrainingArguments

import hf_kvcache.models  # noqa: F401 - reads converted models
from hf_kvcache import convert, new_cache
from hf_kvcache.testing import random_ids, tiny_model

sys.path.append(str(Path(__file__).parents[1] / "examples"))
import train_yoco
import yoco_distill
import yoco_from_scratch
import yoco_models
from yoco_report import write_comparison

TINY = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


@pytest.mark.parametrize("stage", ["projections", "upper", "all"])
def test_a_stage_trains_what_it_says(stage):
    model = convert(tiny_model("llama"), "yoco++", split=0.5, init="reuse")
    yoco_distill.train_only(model, stage)
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    shared = {f"model.layers.1.self_attn.{name}_proj.weight" for name in "kv"}
    queries = {f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (2, 3)}
    unused = {f"model.layers.{layer}.self_attn.{name}_proj.weight" for layer in (2, 3) for name in "kv"}
    upper = {name for name, _ in model.named_parameters() if name.startswith(("model.layers.2", "model.layers.3"))}
    everything = {name for name, _ in model.named_parameters()}
    wanted = {"projections": shared | queries, "upper": shared | upper - unused, "all": everything - unused}
    assert trained == wanted[stage]


def test_distillation_brings_the_student_nearer_and_resumes(tmp_path):
    teacher = tiny_model("llama")
    ids = random_ids(length=4000)[0]

    def distance(model):
        rows = random_ids(batch=4, length=24, seed=5)
        with torch.no_grad():
            wanted, found = (some.eval()(rows, use_cache=False).logits.log_softmax(-1) for some in (teacher, model))
        return float((wanted.exp() * (wanted - found)).sum(-1).mean())

    def run():
        student = convert(copy.deepcopy(teacher), "yoco++", split=0.5, init="reuse")
        before = distance(student)
        yoco_distill.distill(student, teacher, ids, {"projections": 600, "all": 600}, tmp_path, length=24, batch=4)
        return student, before

    student, before = run()
    # the student itself still computes in bfloat16, as accelerate left it
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert distance(loaded) < before
    for name, weight in loaded.state_dict().items():
        assert torch.equal(weight, student.state_dict()[name])
    # everything is done already, so that a second run only reads it
    again, _ = run()
    for name, weight in again.state_dict().items():
        torch.testing.assert_close(weight, student.state_dict()[name])


def test_the_teacher_goes_where_the_student_is(tmp_path):
    class Teacher(nn.Linear):
        def to(self, device):
            moved.append(device)
            return self

    moved = []
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    yoco_distill.Distiller(Teacher(2, 2), model=tiny_model("llama"), args=arguments)
    assert moved == [arguments.device]


class Arrived(Exception):
    pass


class Elsewhere(nn.Linear):
    """A model on a device that cannot compute: it only says whether its input came there."""

    device = torch.device("meta")

    def forward(self, input_ids, labels=None, use_cache=False):
        assert all(tensor.device == self.device for tensor in (input_ids, labels) if tensor is not None)
        raise Arrived


def test_tokens_go_where_the_model_is(monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *args: torch.inference_mode(False))
    model, ids = Elsewhere(2, 2), random_ids(length=40)[0]
    with pytest.raises(Arrived):
        yoco_from_scratch.train(model, lambda step: (ids[None], ids[None]), 1, 1e-3)
    with pytest.raises(Arrived):
        yoco_from_scratch.window_losses(model, [ids], 8)
    with pytest.raises(Arrived):
        yoco_from_scratch.recall_accuracy(model, 2, seed=0)


@pytest.mark.parametrize("task", ["text", "recall"])
def test_models_are_trained_on_the_gpu_where_there_is_one(task, monkeypatch):
    def stop(model, *args, **kwargs):
        assert model.device.type == "meta"
        raise Arrived

    monkeypatch.setattr(yoco_from_scratch, "device", lambda: torch.device("meta"))
    monkeypatch.setattr(yoco_from_scratch, "train", stop)
    budget = yoco_from_scratch.Budget(tokens=96, width=32, layers=2, mlp=48, vocabulary=60, length=16, batch=3)
    with pytest.raises(Arrived):
        if task == "text":
            yoco_from_scratch.train_on_text("transformer", 0, budget, random_ids(length=40)[0], [])
        else:
            yoco_from_scratch.train_on_recall("transformer", 0, budget)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert yoco_models.device() == torch.device("cuda")


def asked(monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", ["train_yoco.py", "-o", "out", *options])
    return train_yoco.parse()


def test_sizes_are_options(monkeypatch):
    assert train_yoco.budget_of(asked(monkeypatch, "--from-scratch")) == yoco_from_scratch.Budget()
    options = ("--width", "1024", "--layers", "12", "--batch", "32", "--length", "512")
    found = train_yoco.budget_of(asked(monkeypatch, *options))
    wanted = {"width": 1024, "layers": 12, "heads": 16, "kv_heads": 8, "mlp": 2816, "length": 512, "batch": 32}
    assert found == yoco_from_scratch.Budget(**wanted)
    for option, given in (("--width", "200"), ("--width", "0"), ("--layers", "5")):
        with pytest.raises(SystemExit, match=f"{option}.*got {given}"):
            train_yoco.budget_of(asked(monkeypatch, option, given))


def test_a_checkpoint_in_16_bit_is_trained_in_float32(monkeypatch):
    import hf_kvcache.cli

    def distill(student, teacher, *args):
        assert {weight.dtype for model in (student, teacher) for weight in model.parameters()} == {torch.float32}
        raise Arrived

    def tokenizer(text, **options):
        return {"input_ids": [1, 2, 3]}

    monkeypatch.setattr(hf_kvcache.cli, "load_model", lambda name: (tiny_model("llama").bfloat16(), tokenizer))
    monkeypatch.setattr(train_yoco, "distill", distill)
    with pytest.raises(Arrived):
        train_yoco.convert_and_distill(asked(monkeypatch, "--init", "reuse", "--split", "0.5"))


@pytest.mark.parametrize(("layers", "kept"), [(30, 22), (4, 3), (2, 1)])
def test_the_default_split_is_a_number_of_layers(layers, kept, monkeypatch):
    import hf_kvcache.cli

    def distill(student, *args):
        assert new_cache(student).spec.sharing.source_layers == (*range(kept), *[kept - 1] * (layers - kept))
        raise Arrived

    def quickly(student, method, init, **options):
        return convert(student, method, init="reuse", **options)

    model = tiny_model("llama", num_hidden_layers=layers)
    monkeypatch.setattr(hf_kvcache.cli, "load_model", lambda name: (model, lambda text, **options: {"input_ids": [1]}))
    monkeypatch.setattr(hf_kvcache, "convert", quickly)
    monkeypatch.setattr(train_yoco, "distill", distill)
    with pytest.raises(Arrived):
        train_yoco.convert_and_distill(asked(monkeypatch))


@pytest.mark.parametrize("name", [*yoco_models.MODELS, yoco_models.CONTROL])
def test_models_are_of_one_size(name):
    plain = yoco_models.count(yoco_models.build("transformer", TINY, 8, seed=0))
    model = yoco_models.build(name, TINY, 8, seed=0, parameters=plain)
    assert yoco_models.count(model) == pytest.approx(plain, rel=0.02)
    again = yoco_models.build(name, TINY, 8, seed=0, parameters=plain)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_recall_asks_for_what_the_context_says():
    ids, labels = yoco_from_scratch.recall_batch(5, seed=0)
    asked = (labels != -100).nonzero().tolist()
    assert len(asked) == 5 * yoco_from_scratch.QUERIES
    for row, column in asked:
        pairs = dict(ids[row, : 2 * yoco_from_scratch.PAIRS].view(-1, 2).tolist())
        assert pairs[int(ids[row, column - 1])] == int(labels[row, column])
    # what the control can see at most: four layers of windows
    assert yoco_from_scratch.GAP > 4 * (yoco_from_scratch.RECALL_WINDOW - 1)


@pytest.mark.slow
def test_comparison_runs_once_and_writes_a_table(tmp_path):
    texts = []
    for index in range(3):
        texts.append(tmp_path / f"text{index}.txt")
        texts[-1].write_text(" ".join(f"word{(7 * index + step * step) % 31}" for step in range(900)))
    budget = yoco_from_scratch.Budget(
        tokens=96, recall_steps=1, width=32, layers=4, mlp=48, vocabulary=280, length=16, batch=3
    )
    runs = yoco_from_scratch.run_all(tmp_path / "out", texts, budget, 2, ["text", "recall"])
    assert len(runs) == 2 * (5 + 6)
    write_comparison(tmp_path / "out", runs)
    with (tmp_path / "out" / "comparison.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["model"] for row in rows if row["task"] == "text"] == list(yoco_models.MODELS)
    assert all(float(row["loss_low"]) <= float(row["loss"]) <= float(row["loss_high"]) for row in rows[:5])
    again = yoco_from_scratch.run_all(tmp_path / "out", texts, budget, 2, ["text", "recall"])
    assert again == runs
    with pytest.raises(ValueError, match="another budget"):
        yoco_from_scratch.run_all(tmp_path / "out", texts, yoco_from_scratch.Budget(), 2, ["text"])
