"""What the assemblers make of the Triton kernels: registers that spill, shared memory, instructions an element."""

import ast
import csv
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "benchmarks" / "kernels_aot.py"
TABLE = ROOT / "examples" / "benchmarks" / "results" / "kernels_aot.csv"


def tools() -> str | None:
    """Why nothing can be compiled here; None when it can."""
    if find_spec("triton") is None:
        return "Triton is not installed"
    import triton

    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    missing = [name for name in ("ptxas", "cuobjdump", "nvdisasm") if not (folder / name).exists()]
    return f"Triton came without {', '.join(missing)}" if missing else None


MISSING = tools()
NEEDS_TOOLS = pytest.mark.skipif(MISSING is not None, reason=MISSING or "")


def check(*arguments: str) -> subprocess.CompletedProcess:
    # the interpreter of the other tests would take the place of the compiler
    environment = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "PYTHONPATH")}
    environment["PYTHONPATH"] = str(ROOT)
    return subprocess.run(
        [sys.executable, str(SCRIPT), "--check", *arguments], env=environment, capture_output=True, text=True
    )


@NEEDS_TOOLS
def test_the_decode_loops_keep_to_their_budget():
    """A few configurations of the newest target that an instruction or a register is likely to creep into."""
    ran = check("--quick")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "0 failures" in ran.stdout


@NEEDS_TOOLS
@pytest.mark.slow
def test_every_kernel_compiles_for_every_target():
    ran = check()
    assert ran.returncode == 0, ran.stdout + ran.stderr


def excused() -> set[tuple[str, str]]:
    """The keys of EXCUSED in the script, which cannot be imported beside an interpreter."""
    for node in ast.parse(SCRIPT.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "EXCUSED":
            return set(ast.literal_eval(node.value))
    raise AssertionError(f"no EXCUSED in {SCRIPT}")


def test_the_table_says_what_is_wrong():
    """Every line of the published table is within its budget and free of spills, or a known exception."""
    if not TABLE.exists():
        pytest.skip(f"{TABLE.name} is not published yet")
    with TABLE.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["target"] for row in rows} == {"sm_80", "sm_89", "sm_90", "sm_100"}
    wrong = {(row["kernel"], row["target"]) for row in rows if row["wrong"]}
    assert wrong == excused()
    for row in rows:
        if row["budget"]:
            assert float(row["instructions an element"]) <= float(row["budget"])
