"""Who computes an operator: Triton or PyTorch, what is said about it, and that Triton can be missing."""

import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from hf_kvcache import patch_model
from hf_kvcache.codecs import DenseCodec, TurboQuantCodec, chunks
from hf_kvcache.kernels import code_attention as code_attention_module
from hf_kvcache.kernels import encode_entries as encode_entries_module
from hf_kvcache.kernels import library
from hf_kvcache.kernels.code_attention import code_attention, pack
from hf_kvcache.kernels.decode_attention import decode_attention
from hf_kvcache.kernels.merge_states import merge_states
from hf_kvcache.segment import Segment
from hf_kvcache.stores import DeviceStore
from hf_kvcache.testing import greedy, random_ids, tiny_model

ROOT = Path(__file__).resolve().parents[2]
NEEDS_TRITON = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


@pytest.fixture
def launches(monkeypatch):
    """Names of the operators that went to Triton, in order."""
    seen = []
    real = library.import_module

    def record(name):
        if ".triton_ops." in name and not name.endswith(".launch"):
            seen.append(name.rsplit(".", 1)[1])
        return real(name)

    monkeypatch.setattr(library, "import_module", record)
    return seen


def inputs(dim=16, tokens=20, dtype=torch.float32):
    return tuple(torch.randn(1, 2, n, dim).to(dtype) for n in (3, tokens, tokens))


def coded(dim=16, tokens=20, bits=4):
    codes = torch.randint(0, 2**bits, (2 * tokens, dim), dtype=torch.uint8)
    return pack(codes, bits), torch.rand(2 * tokens).half(), torch.arange(2.0**bits) - (2**bits - 1) / 2


def test_cpu_tensors_stay_in_pytorch(launches, monkeypatch):
    monkeypatch.delenv(library.BACKEND, raising=False)
    decode_attention(*inputs(), scale=0.2)
    torch.ops.hf_kvcache.decode_attention(*inputs(), None, 0.2, 0.0)
    assert not launches


@NEEDS_TRITON
def test_the_variable_is_read_at_every_call(launches, monkeypatch):
    monkeypatch.setenv(library.BACKEND, "triton")
    decode_attention(*inputs(), scale=0.2)
    assert launches == ["decode_attention"]
    monkeypatch.setenv(library.BACKEND, "reference")
    decode_attention(*inputs(), scale=0.2)
    assert launches == ["decode_attention"]


@NEEDS_TRITON
def test_a_kernel_is_launched_on_the_device_of_its_tensors(launches, monkeypatch):
    """The current device may be another one: Triton would launch there."""
    within = []

    @contextmanager
    def device_of(tensor):
        within.append((tensor, len(launches)))
        yield
        within.append((tensor, len(launches)))

    monkeypatch.setenv(library.BACKEND, "triton")
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    query, key, value = inputs()
    decode_attention(query, key, value, scale=0.2)
    assert [count for _, count in within] == [1, 1] and all(tensor is query for tensor, _ in within)


def test_another_value_of_the_variable_is_an_error(monkeypatch):
    monkeypatch.setenv(library.BACKEND, "cuda")
    with pytest.raises(ValueError, match="HF_KVCACHE_BACKEND must be one of reference, triton or not set, got 'cuda'"):
        decode_attention(*inputs(), scale=0.2)


def test_insisting_on_triton_where_it_cannot_run(monkeypatch):
    monkeypatch.setenv(library.BACKEND, "triton")
    monkeypatch.setattr(library, "why_not", lambda device: "there is none here")
    with pytest.raises(RuntimeError, match="HF_KVCACHE_BACKEND=triton, but there is none here; unset"):
        decode_attention(*inputs(), scale=0.2)


class CudaLike:
    """What `uses_triton` and `why_not` look at in a CUDA tensor."""

    device = torch.device("cuda", 0)


@pytest.fixture
def a_gpu(monkeypatch):
    """Pretends that there is a GPU of a capability, and no interpreter."""

    def make(capability, name="Some GPU"):
        monkeypatch.delenv(library.BACKEND, raising=False)
        monkeypatch.setattr(torch.version, "hip", None, raising=False)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
        if find_spec("triton") is not None:
            from hf_kvcache.kernels.triton_ops import launch

            monkeypatch.setattr(launch, "INTERPRETED", False)
        library.why_not.cache_clear()
        library._say_once.cache_clear()
        return CudaLike()

    yield make
    library.why_not.cache_clear()
    library._say_once.cache_clear()


@NEEDS_TRITON
def test_an_old_gpu_is_mentioned_once(a_gpu, recwarn):
    tensor = a_gpu((7, 5), "Tesla T4")
    assert not library.uses_triton(tensor) and not library.uses_triton(tensor)
    (said,) = [str(warning.message) for warning in recwarn if "hf_kvcache" in str(warning.message)]
    assert "Tesla T4 is sm_75, older than sm_80" in said


@NEEDS_TRITON
@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0), (12, 0)])
def test_a_gpu_that_is_new_enough(a_gpu, recwarn, capability):
    assert library.uses_triton(a_gpu(capability))
    assert not recwarn.list


def test_cuda_without_triton_is_mentioned_once(a_gpu, monkeypatch, recwarn):
    tensor = a_gpu((9, 0))
    monkeypatch.setattr(library, "find_spec", lambda name: None if name == "triton" else object())
    assert not library.uses_triton(tensor) and not library.uses_triton(tensor)
    (said,) = [str(warning.message) for warning in recwarn if "hf_kvcache" in str(warning.message)]
    assert "Triton is not installed (pip install 'hf_kvcache[triton]')" in said


@NEEDS_TRITON
@pytest.mark.parametrize(
    "call",
    [
        lambda: decode_attention(*inputs(dtype=torch.float64), scale=0.2),
        lambda: decode_attention(*inputs(), torch.zeros(3, 20), scale=0.2),
        lambda: decode_attention(*inputs(dim=264), scale=0.2),
        lambda: code_attention(torch.randn(1, 2, 3, 16), coded(bits=8), coded(), scale=0.2),
        lambda: code_attention(torch.randn(1, 2, 3, 24), coded(24), coded(24), scale=0.2),
        lambda: code_attention(torch.randn(1, 2, 3, 16), coded(), coded(), None, torch.rand(3, 20) < 0.9, scale=0.2),
        lambda: code_attention(
            torch.randn(1, 2, 3, 16), (*coded()[:2], torch.rand(16).sort().values), coded(), scale=0.2
        ),
        lambda: code_attention(torch.randn(1, 2, 3, 16).double(), coded(), coded(), scale=0.2),
        lambda: merge_states(*(torch.rand(4, *s, dtype=torch.float64) for s in ((8,), (), (8,), ()))),
    ],
    ids=["float64", "additive mask", "wide heads", "8 bits", "head_dim 24", "masked codes", "any levels",
         "float64 codes", "float64 states"],
)  # fmt: skip
def test_what_has_no_kernel_is_computed_by_pytorch(monkeypatch, launches, call):
    monkeypatch.setenv(library.BACKEND, "reference")
    torch.manual_seed(1)
    expected = call()
    monkeypatch.setenv(library.BACKEND, "triton")
    torch.manual_seed(1)
    for actual, tensor in zip(call(), expected, strict=True):
        assert torch.equal(actual, tensor)
    assert launches


@NEEDS_TRITON
@pytest.mark.parametrize(
    "method",
    [
        pytest.param(None, marks=pytest.mark.slow),
        pytest.param("snapkv", marks=pytest.mark.slow),
        "adakv+turboquant",
        pytest.param("turboquant", marks=pytest.mark.slow),
    ],
)
def test_a_model_generates_the_same_tokens(monkeypatch, launches, method):
    """Whole models through the kernels: beams share rows, heads are ragged, rows are padded."""
    options = {"budget": 0.5} if method and "kv" in method else {}
    ids = random_ids(batch=2, length=20)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    tokens = {}
    for backend in ("reference", "triton"):
        monkeypatch.setenv(library.BACKEND, backend)
        model = tiny_model("llama", head_dim=32, num_hidden_layers=1)
        patch_model(model, method=method, **options)
        tokens[backend] = model.generate(ids, attention_mask=mask, max_new_tokens=2, num_beams=2, do_sample=False)
    assert torch.equal(tokens["triton"], tokens["reference"])
    assert {"decode_attention", "merge_states"} <= set(launches)
    if method and "turboquant" in method:
        assert {"code_attention", "ragged_attention"} & set(launches)


@NEEDS_TRITON
@pytest.mark.parametrize(
    "codec,dim,dtype",
    [
        (TurboQuantCodec(8, 8), 32, torch.float32),
        (TurboQuantCodec(4, 8), 32, torch.float32),
        (TurboQuantCodec(4, 4), 24, torch.float32),
        (DenseCodec(), 16, torch.float64),
    ],
    ids=repr,
)
@pytest.mark.parametrize("rows", [[0, 1], [1, 1, 0]], ids=str)
def test_ragged_heads_without_a_kernel_are_attended_by_blocks(monkeypatch, codec, dim, dtype, rows):
    """The reference of the ragged operators reads the list of work back to the host, which no graph can."""
    generator = torch.Generator().manual_seed(0)
    key, value = (torch.randn(2, 2, 90, dim, generator=generator, dtype=dtype) for _ in range(2))
    keep = torch.rand(2, 2, 90, generator=generator) < torch.tensor([0.3, 0.8])[:, None]
    query = torch.randn(len(rows), 2, 3, dim, generator=generator, dtype=dtype)
    monkeypatch.setenv(library.BACKEND, "reference")
    segment = Segment.seal(codec, DeviceStore(), key, value, keep).select_rows(rows)
    expected = segment.attend(query, dim**-0.5, 0.0)
    monkeypatch.setenv(library.BACKEND, "triton")
    monkeypatch.setattr("hf_kvcache.kernels.ragged_attention._by_stretch", lambda *_: pytest.fail("one by one"))
    for actual, tensor in zip(segment.attend(query, dim**-0.5, 0.0), expected, strict=True):
        # blocks without a mask have a kernel where the codes have one
        torch.testing.assert_close(actual, tensor, rtol=1e-5, atol=1e-5)


def test_a_gpu_gets_more_at_a_time_than_a_cpu():
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    for module, names in (
        (code_attention_module, ("ENTRIES", "SCORES")),
        (encode_entries_module, ("ROWS",)),
        (chunks, ("ENTRIES",)),
    ):
        for name in names:
            few, many = getattr(module, name), getattr(module, f"GPU_{name}")
            assert library.at_once(cpu, few, many) == few < library.at_once(gpu, few, many) >= 1 << 18


def copy_without_triton_ops(target: Path) -> Path:
    unwanted = shutil.ignore_patterns("__pycache__", "triton_ops")
    shutil.copytree(ROOT / "hf_kvcache", target / "hf_kvcache", symlinks=True, ignore=unwanted)
    for folder in ("kernels", "patches"):
        shutil.copytree(ROOT / folder, target / folder, ignore=unwanted)
    return target


WITHOUT = """
import warnings, torch, hf_kvcache
from hf_kvcache import patch_model
from hf_kvcache.kernels import library
from hf_kvcache.testing import greedy, random_ids, tiny_model
assert hf_kvcache.__file__.startswith({tree!r})
model, ids = tiny_model("llama", num_hidden_layers=2), random_ids(batch=2, length=12)
print(greedy(patch_model(model, method="adakv+turboquant", budget=0.5), ids, 4).tolist())
class Cuda: device = torch.device("cuda")
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    assert not library.uses_triton(Cuda())
assert "this installation has no hf_kvcache.kernels.triton_ops" in str(said[0].message)
"""


def test_without_triton_ops_the_library_is_correct(tmp_path):
    tree = copy_without_triton_ops(tmp_path)
    environment = {key: value for key, value in os.environ.items() if key not in (library.BACKEND, "PYTHONPATH")}
    code = WITHOUT.format(tree=str(tree))
    ran = subprocess.run([sys.executable, "-c", code], cwd=tree, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    model, ids = tiny_model("llama", num_hidden_layers=2), random_ids(batch=2, length=12)
    expected = greedy(patch_model(model, method="adakv+turboquant", budget=0.5), ids, 4)
    assert ran.stdout.strip() == str(expected.tolist())
