"""Long generations: flat memory, positions that do not drift, and no error that grows with the number of flushes.

What is looked at is in `examples/benchmarks/long_generation.py`, which runs longer.
"""

import importlib.util
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "examples" / "benchmarks"
METHODS = ["streamingllm", "tova", "h2o", "adakv"]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    spec = importlib.util.spec_from_file_location("long_generation", FOLDER / "long_generation.py")
    module = importlib.util.module_from_spec(spec)
    # dataclasses look up their own module
    monkeypatch.setitem(__import__("sys").modules, "long_generation", module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize(("family", "tokens"), [("llama", 3000), ("qwen3", 800)])
@pytest.mark.parametrize("method", METHODS)
def test_memory_is_flat_and_nothing_drifts(script, family, tokens, method):
    run = script.generate(family, method, tokens, compared=400)
    half = len(run.bytes) // 2
    assert max(run.bytes[half:]) <= max(run.bytes[:half]) + script.block_bytes(run.cache)
    assert run.cache.get_seq_length() == run.mask.shape[1] + tokens - 1
    assert run.most_kept < script.BUDGET + script.EVERY
    if method in ("streamingllm", "tova"):
        assert script.difference(run, family, method) < 1e-3


@pytest.mark.slow
def test_errors_do_not_grow_with_the_number_of_flushes(script):
    rows = script.codec_rows(2048)
    ours = [row for row in rows if row["cache"].endswith("once") and row["against"] == "what it was given"]
    assert {row["flushes"] for row in ours} == {4, 8, 12, 16}
    for row in ours:
        assert row["first_tokens_unchanged"]
        assert row["error_oldest"] < 1.05 * row["error_newest"] < 0.11
    again = [row for row in rows if row["cache"] == "turboquant, all anew at every flush" and row["tokens"] == 2048]
    assert all(row["error_oldest"] > 1.15 * row["error_newest"] for row in again if row["of"] == "key")
