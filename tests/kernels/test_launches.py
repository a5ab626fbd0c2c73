"""A compiled decoding step has no more launches than `results/launches.csv` says, nor than transformers' own."""

import csv
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "examples" / "benchmarks"
COUNT = """
import launches

for row in launches.rows(launches.SETTINGS[-1:]):
    print(row["setting"], row["launches a layer"], sep=";")
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_launches_of_a_step():
    # in a process of its own: the kernels are imported for the interpreter
    run = subprocess.run([sys.executable, "-c", COUNT], cwd=BENCHMARKS, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    found = dict(line.split(";") for line in run.stdout.splitlines())
    with (BENCHMARKS / "results" / "launches.csv").open(newline="") as file:
        known = {row["setting"]: int(row["launches a layer"]) for row in csv.DictReader(file)}
    assert len(found) == 2 and set(found) <= set(known)
    for setting, number in found.items():
        # transformers' own may change with its version
        assert int(number) <= known[setting] or "transformers" in setting, setting
    ours = max(int(number) for setting, number in found.items() if "transformers" not in setting)
    assert ours <= known["transformers, static cache"]
