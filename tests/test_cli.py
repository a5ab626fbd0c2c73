"""The command line: lists, calibrates, reports, and answers a mistake with one line and exit code 2."""

import sys

import pytest
import torch

from hf_kvcache import METHODS, SharingPlan, new_cache, patch_model
from hf_kvcache.cli import main
from hf_kvcache.testing import random_ids, tiny_model


def run(monkeypatch, capsys, *arguments):
    """Runs the command line; returns exit code, output and errors."""
    monkeypatch.setattr(sys, "argv", ["hf-kvcache", *map(str, arguments)])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stop:
        main()
    captured = capsys.readouterr()
    return stop.value.code or 0, captured.out, captured.err


def test_methods_lists_every_method(monkeypatch, capsys):
    code, out, _ = run(monkeypatch, capsys, "methods")
    assert code == 0
    for name, method in METHODS.items():
        assert name in out and method.slot in out


def test_report_reads_plans_and_caches(monkeypatch, capsys, tmp_path):
    SharingPlan.from_pairs(4, [(3, 1)], settings={"order": "kl"}).save(tmp_path / "plan.safetensors")
    code, out, _ = run(monkeypatch, capsys, "report", tmp_path / "plan.safetensors")
    assert code == 0 and "3<-1" in out and "kl" in out
    model = patch_model(tiny_model("llama"))
    cache = new_cache(model)
    with torch.no_grad():
        model(random_ids(length=20), past_key_values=cache)
    cache.save(tmp_path / "cache.safetensors")
    code, out, _ = run(monkeypatch, capsys, "report", tmp_path / "cache.safetensors")
    assert code == 0 and "tokens seen: 20" in out


def test_report_of_a_configuration_is_the_papers_arithmetic(monkeypatch, capsys):
    code, out, _ = run(monkeypatch, capsys, "report", "--config", "yoco")
    assert code == 0 and "4,096 B" in out and "106,496 B" in out and "20,447,232 B, states in float32" in out


@pytest.mark.parametrize("method", ["yoco", "yoco++"])
def test_report_of_a_converted_model_counts_what_is_shared(monkeypatch, capsys, tmp_path, method):
    patch_model(tiny_model("llama"), method, split=0.5).save_pretrained(tmp_path)
    code, out, _ = run(monkeypatch, capsys, "report", "--config", tmp_path)
    assert code == 0 and "keys and values of a token: 128 B; 256 B where every layer" in out


def test_report_of_a_converted_model_with_windows_is_refused(monkeypatch, capsys, tmp_path):
    patch_model(tiny_model("gemma3_text", num_hidden_layers=4), "yoco", split=3).save_pretrained(tmp_path)
    code, _, err = run(monkeypatch, capsys, "report", "--config", tmp_path)
    assert code == 2 and "gemma3_text has layers with windows" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("report",), "--config and a model"),
        (("report", "absent.safetensors"), "there is no file"),
        (("report", "--config", "absent/model"), "expected the folder, name or model type"),
        (("calibrate", "kvsharer", "smollm2", "-o", "plan.safetensors", "--share", "2"), "share must be"),
        (("unheard-of",), "No such command"),
    ],
    ids=["nothing", "file", "model", "option", "command"],
)
def test_a_mistake_is_one_message_and_code_2(monkeypatch, capsys, tmp_path, arguments, words):
    monkeypatch.chdir(tmp_path)
    code, _, errors = run(monkeypatch, capsys, *arguments)
    assert code == 2 and words in errors and "Traceback" not in errors
