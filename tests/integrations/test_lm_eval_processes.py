"""lm-eval's command line under `accelerate launch`: processes share the documents, and the scores are those of one."""

import json
import re
import sys

import pytest

from hf_kvcache import smollm2
from hf_kvcache.testing import tiny_model
from tests.test_processes import launched

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install -e '.[lm-eval]'")
pytest.importorskip("accelerate", reason="accelerate is not installed: pip install accelerate")
if not smollm2.available():
    pytest.skip("the tokenizer of SmolLM2 is not installed", allow_module_level=True)

TASKS = ("hfkv_kv_20", "hfkv_rolling", "hfkv_passkey")
# without MPI accelerate starts several processes for GPUs only; the variable puts them on the CPU
LAUNCH = (
    *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
    *("--mixed_precision", "no", "--dynamo_backend", "no"),
)


def results(folder, command):
    """The scores of every task, the ids of the documents that were answered, and how many each process was given."""
    tasks = ["--tasks", ",".join(TASKS), "--limit", "3", "--device", "cpu"]
    chosen = f"pretrained={folder / 'model'},method=knorm,budget=0.5"
    output = folder / f"out {len(command)}"
    rest = ["--model", "hf-kvcache", "--model_args", chosen, *tasks, "--output_path", output, "--log_samples"]
    program = [sys.executable, *command, "-m", "hf_kvcache.cli", "lm-eval", "run", *rest]
    given = re.search(r"Tokenizing inputs: .*?\| 0/(\d+)", launched(program, ACCELERATE_USE_CPU="true"))
    found = json.loads(next(output.rglob("results_*.json")).read_text())["results"]
    seen = {
        task: sorted(json.loads(line)["doc_id"] for line in next(output.rglob(f"samples_{task}_*")).open())
        for task in TASKS
    }
    numbers = {task: {name: value for name, value in found[task].items() if isinstance(value, float)} for task in TASKS}
    return numbers, seen, int(given[1])


@pytest.mark.slow
def test_two_processes_score_what_one_does(tmp_path):
    tokenizer = smollm2.load()[1]
    tokenizer.save_pretrained(tmp_path / "model")
    tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=2048).save_pretrained(tmp_path / "model")
    (one, all_seen, all_given), (two, seen, given) = (results(tmp_path, command) for command in ((), LAUNCH))
    assert all_given == 3 and given == 2
    # every document once
    assert seen == all_seen == {task: [0, 1, 2] for task in TASKS}
    for task in TASKS:
        assert two[task] == pytest.approx(one[task], rel=1e-6)
