"""More than one thread, device or process: each gives what one alone gives."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hf_kvcache import new_cache, patch_model
from hf_kvcache.api import check_processes
from hf_kvcache.testing import greedy, random_ids, tiny_model

ROOT = Path(__file__).parents[1]
OPTIONS = {
    "none": {},
    "snapkv": {"method": "snapkv", "budget": 0.5, "window": 4},
    "turboquant": {"method": "turboquant", "bits": 4},
}


def test_two_threads_generate_on_two_patched_models():
    models = [
        patch_model(tiny_model(family), **OPTIONS[name]) for family, name in (("llama", "snapkv"), ("qwen3", "none"))
    ]
    ids = [random_ids(2, 40, seed) for seed in range(2)]
    alone = [greedy(model, one) for model, one in zip(models, ids, strict=True)]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(4):
            together = list(pool.map(greedy, models, ids))
            assert all(torch.equal(*pair) for pair in zip(alone, together, strict=True))


def test_two_threads_generate_on_one_patched_model():
    model = patch_model(tiny_model("llama"), **OPTIONS["snapkv"])
    ids = [random_ids(1, 30 + seed, seed) for seed in range(4)]
    alone = [greedy(model, one) for one in ids]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda one: greedy(model, one), ids))
    assert all(torch.equal(*pair) for pair in zip(alone, together, strict=True))


@pytest.mark.parametrize("method", OPTIONS)
def test_a_dispatched_model_generates_the_same(method, tmp_path):
    """`device_map` with weights on disk, the only second place that a machine without a GPU has."""
    from transformers import AutoModelForCausalLM

    model = tiny_model("llama")
    expected = greedy(patch_model(model, **OPTIONS[method]), random_ids(1, 40))
    tiny_model("llama").save_pretrained(tmp_path / "model")
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{layer}": "disk" if layer % 2 else "cpu" for layer in range(4)}
    dispatched = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=str(tmp_path / "offload")
    )
    dispatched.generation_config.pad_token_id = 0
    assert torch.equal(greedy(patch_model(dispatched, **OPTIONS[method]), random_ids(1, 40)), expected)


def test_processes_of_a_tensor_parallel_model_look_nothing_up(tmp_path):
    spec = new_cache(patch_model(tiny_model("llama"), "sequential", store=tmp_path / "store")).spec
    with pytest.raises(NotImplementedError, match="sequential looks a prompt up in every process"):
        check_processes(SimpleNamespace(tp_size=2), spec)
    check_processes(SimpleNamespace(tp_size=1), spec)


TENSOR_PARALLEL = """
import sys
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM
from hf_kvcache import new_cache, patch_model, report
from hf_kvcache.testing import greedy, random_ids

folder, expected = sys.argv[1], torch.load(sys.argv[2])
dist.init_process_group("gloo")
mesh = torch.distributed.init_device_mesh("cpu", (dist.get_world_size(),))
model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto", device_mesh=mesh, dtype=torch.float32)
model.generation_config.pad_token_id = 0
try:
    patch_model(model, "adakv", budget=0.5)
    raise RuntimeError("heads of other processes were ignored")
except NotImplementedError as error:
    assert "adakv would compare heads" in str(error), error
for name, options in {options!r}.items():
    patch_model(model, **options)
    ids = random_ids(1, 40)
    assert torch.equal(greedy(model, ids), expected[name]), name
    cache = new_cache(model)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    # this process holds one of the two heads
    assert len(report(cache).layers[0].stored) == 1, report(cache).layers[0].stored
print("done", dist.get_rank())
dist.destroy_process_group()
"""


def launched(command: list, **environment: str) -> str:
    """What a command prints, run in the root with the package of this checkout."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    kept = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | environment
    done = subprocess.run(list(map(str, command)), env=kept, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
def test_tensor_parallel_processes_generate_what_one_does(tmp_path):
    """Methods that decide head by head; two processes on the CPU, each with one of two KV heads."""
    model = tiny_model("llama")
    expected = {name: greedy(patch_model(model, **options), random_ids(1, 40)) for name, options in OPTIONS.items()}
    tiny_model("llama").save_pretrained(tmp_path / "model")
    torch.save(expected, tmp_path / "expected.pt")
    script = tmp_path / "script.py"
    script.write_text(TENSOR_PARALLEL.replace("{options!r}", repr(OPTIONS)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
    assert launched([*command, tmp_path / "model", tmp_path / "expected.pt"]).count("done") == 2


DATA_PARALLEL = """
import sys
import torch
from accelerate import PartialState
from hf_kvcache import patch_model
from hf_kvcache.integrations.scoring import ScoredText, score_texts
from hf_kvcache.testing import random_ids, tiny_model
from accelerate.utils import gather_object

texts = [ScoredText(tuple(random_ids(1, 40, seed)[0].tolist()), 30, 31) for seed in range(6)]
model = patch_model(tiny_model("llama"), "knorm", budget=0.5)
assert PartialState(cpu=True).num_processes == 2
with PartialState(cpu=True).split_between_processes(texts) as mine:
    found = gather_object(score_texts(model, mine))
if PartialState().is_main_process:
    assert found == score_texts(model, texts), found
    print("done")
"""


@pytest.mark.slow
def test_processes_of_accelerate_score_what_one_does(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(DATA_PARALLEL)
    # without MPI accelerate starts several processes for GPUs only; the script puts them on the CPU
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    command = [sys.executable, *launch, "--mixed_precision", "no", "--dynamo_backend", "no", script]
    assert "done" in launched(command)
