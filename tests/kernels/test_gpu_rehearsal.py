"""The run for a GPU, at tiny sizes on a CPU: every part of it is called, and what must be right is."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "benchmarks" / "gpu.py"


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_the_rehearsal():
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ran = subprocess.run([sys.executable, str(SCRIPT), "--rehearse"], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    lines = ran.stdout.splitlines()
    for part in (
        *("what copy", "what correct: 3 bits, cubic, ragged", "what correct: encode_entries, 2 bits, values"),
        *("what correct: gated_retention, state", "what correct: select", "what SDPA bfloat16", "what window scores"),
        *("what 4 bits, longest run 16 x the mean", "what encode 4 bits", "what gated retention"),
        *("what prefill attention and its projections", "what what eviction to codes adds to it"),
        *("what a token, DynamicCache", "what a token, adakv+turboquant, as a graph, with its flushes"),
    ):
        assert any(line.startswith(part) for line in lines), f"no line begins with {part!r}"
    assert "nothing was measured and nothing is written" in lines[-1]
    # nor does a rehearsal claim a time
    assert not any("microseconds" in line and "goal" not in line for line in lines)


def test_without_a_gpu_it_says_so():
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    ran = subprocess.run([sys.executable, str(SCRIPT)], env=environment, capture_output=True, text=True)
    assert ran.returncode == 2 and "needs a CUDA device" in ran.stdout
