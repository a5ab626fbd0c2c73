"""The command line: lists, calibrates, reports, and answers a mistake with one line and exit code 2."""

import subprocess
import sys

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from hf_kvcache import METHODS, SharingPlan, measure_heads, new_cache, patch_model, safefile
from hf_kvcache.calibration.sequential_basis import calibrate_basis
from hf_kvcache.cli import load_model, main
from hf_kvcache.plan import CachePlan
from hf_kvcache.planning import Tuned, Verified
from hf_kvcache.testing import random_ids, tiny_model


def run(monkeypatch, capsys, *arguments):
    """Runs the command line; returns exit code, output and errors."""
    monkeypatch.setattr(sys, "argv", ["hf-kvcache", *map(str, arguments)])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stop:
        main()
    captured = capsys.readouterr()
    return stop.value.code or 0, captured.out, captured.err


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The folder of a model in 16 bits and a tokenizer of one token."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model("llama").half().save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0}, "a"))).save_pretrained(folder)
    return folder


def test_the_options_of_a_method_are_described(monkeypatch, capsys):
    code, out, _ = run(monkeypatch, capsys, "methods", "kvzip")
    assert code == 0 and "arXiv 2505.23416" in out
    described = {line.split()[0]: line for line in out.splitlines() if line}
    assert "2048" in described["chunk"] and "repeated in one forward" in described["chunk"]
    assert "tokens kept a KV head" in described["budget"]
    code, _, err = run(monkeypatch, capsys, "methods", "kvzp")
    assert code == 2 and "did you mean 'kvzip'" in err


def test_methods_lists_every_method(monkeypatch, capsys):
    code, out, _ = run(monkeypatch, capsys, "methods")
    assert code == 0
    for name, method in METHODS.items():
        assert name in out and all(slot in out for slot in method.slot.split(", "))


@pytest.mark.parametrize("module", ["hf_kvcache", "hf_kvcache.cli"])
def test_the_module_is_the_command(module):
    """As `accelerate launch -m` starts it."""
    done = subprocess.run([sys.executable, "-m", module, "methods"], capture_output=True, text=True)
    assert done.returncode == 0 and "snapkv" in done.stdout, done.stderr


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


def test_report_reads_a_basis_and_refuses_what_it_does_not_know(monkeypatch, capsys, tmp_path):
    model = tiny_model("llama")
    basis = calibrate_basis(model, texts=random_ids(4, 512), samples=4, length=512)
    basis.save(tmp_path / "basis.safetensors")
    code, out, _ = run(monkeypatch, capsys, "report", tmp_path / "basis.safetensors")
    # a long path makes the console break lines
    out = " ".join(out.split())
    assert code == 0 and f"{basis.fingerprint}, 4 layers" in out and f"{basis.nbytes:,} bytes" in out
    safefile.write(tmp_path / "later.safetensors", "hf_kvcache.later/1", {}, {"a": torch.zeros(1)})
    code, _, errors = run(monkeypatch, capsys, "report", tmp_path / "later.safetensors")
    assert code == 2 and "'hf_kvcache.later/1', which this version does not know" in errors


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
        (("tune", "absent", "-o", "plan"), "expected the folder or name of a model, or 'smollm2', got 'absent'"),
        (("tune", "smollm2", "-o", "plan", "--dtype", "int8"), "--dtype must be one of float32"),
        (("tune", "{tiny}", "-o", "plan", "--device", "abacus"), "--device must be 'auto' or one the model can run on"),
    ],
    ids=["nothing", "file", "config", "option", "command", "model", "dtype", "device"],
)
def test_a_mistake_is_one_message_and_code_2(monkeypatch, capsys, tmp_path, tiny, arguments, words):
    monkeypatch.chdir(tmp_path)
    code, _, errors = run(monkeypatch, capsys, *(argument.format(tiny=tiny) for argument in arguments))
    assert code == 2 and words in errors and "Traceback" not in errors


def test_brackets_are_printed_as_they_are(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, _, errors = run(monkeypatch, capsys, "report", "[lm-eval].safetensors")
    assert code == 2 and "there is no file [lm-eval].safetensors" in errors
    SharingPlan.from_pairs(4, [(3, 1)], settings={"texts": "[bold] [/red] :warning:"}).save("plan.safetensors")
    code, out, _ = run(monkeypatch, capsys, "report", "plan.safetensors")
    assert code == 0 and "[bold] [/red] :warning:" in out


def test_a_plan_is_written_where_there_is_no_folder_yet(monkeypatch, capsys, tmp_path, tiny):
    found = Verified(0.1, 0.2, 8.0)
    made = Tuned(CachePlan.uniform(4, 2, 0.5, 4, 4), 0.3, found, found)
    monkeypatch.setattr("hf_kvcache.planning.tune", lambda *args, **options: made)
    monkeypatch.chdir(tmp_path)
    code, out, errors = run(monkeypatch, capsys, "tune", tiny, "-o", "new/folder/plan.safetensors")
    assert code == 0 and "saved new/folder/plan.safetensors" in out, errors
    assert CachePlan.load("new/folder/plan.safetensors").num_layers == 4


@pytest.mark.parametrize("command", [("tune",), ("calibrate", "kvsharer"), ("calibrate", "headkv")])
def test_a_place_that_cannot_be_written_is_refused_before_a_model_is_loaded(monkeypatch, capsys, tmp_path, command):
    (tmp_path / "file").touch()
    for place in (tmp_path / "file" / "plan", tmp_path):
        code, _, errors = run(monkeypatch, capsys, *command, "absent", "-o", place)
        assert code == 2 and str(place) in errors and "smollm2" not in errors


def test_a_file_that_cannot_be_written_is_an_error_of_the_system(tmp_path):
    with pytest.raises(OSError, match=r"absent/plan.* could not be written .* expected a file in a folder"):
        CachePlan.uniform(4, 2, 0.5, 4, 4).save(tmp_path / "absent" / "plan")


@pytest.mark.parametrize(("name", "dtype"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_a_model_is_loaded_in_the_dtype_asked_whatever_its_file_says(tiny, name, dtype):
    assert load_model(str(tiny), dtype=name)[0].dtype == dtype


def test_measuring_in_16_bits_warns(caplog):
    with pytest.raises(ValueError, match="tokenizer"):
        measure_heads(tiny_model("llama").bfloat16())
    assert "a model in bfloat16" in caplog.text
