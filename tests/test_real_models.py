"""Real models: found in packages of parts, checked, and a clear word when they are not there."""

import hashlib

import pytest

from hf_kvcache import smollm2
from hf_kvcache.real_models import QWEN_CODER, REAL_MODELS, SMOLLM2, RealModel, _join


@pytest.fixture
def parts(monkeypatch, tmp_path):
    """A model of two parts in two installed packages, and an empty cache folder."""
    for number, content in ((1, b"first "), (2, b"second")):
        folder = tmp_path / "site" / f"toy_part{number}"
        folder.mkdir(parents=True)
        (folder / "__init__.py").touch()
        (folder / "part.bin").write_bytes(content)
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tuple((f"toy_part{number}", "part.bin") for number in (1, 2))


def test_parts_are_joined_in_order(parts, tmp_path):
    model = RealModel("toy", parts, "", "pip install toy")
    paths = [model._path(*piece) for piece in parts]
    assert _join(paths, tmp_path / "whole") == hashlib.sha256(b"first second").hexdigest()
    assert (tmp_path / "whole").read_bytes() == b"first second"


def test_another_file_is_refused_and_nothing_is_left(parts, tmp_path):
    model = RealModel("toy", parts, "0" * 64, "pip install toy")
    assert model.available and not model.converted
    with pytest.raises(ValueError, match=r"expected sha256 0000.*pip install toy"):
        model.load()
    assert not list((tmp_path / "cache" / "hf_kvcache").iterdir())


def test_what_is_missing_is_said(parts):
    model = RealModel("toy", (*parts, ("toy_part3", "part.bin")), "0" * 64, "pip install toy")
    assert not model.available
    with pytest.raises(ModuleNotFoundError, match=r"'toy_part3' or the converted model in .*pip install toy"):
        model.load()


def test_the_table():
    assert REAL_MODELS == {"smollm2": SMOLLM2, "qwen-coder": QWEN_CODER}
    assert len(QWEN_CODER.pieces) == 6
    assert smollm2.available() == SMOLLM2.available


@pytest.mark.slow
@pytest.mark.skipif(not QWEN_CODER.available, reason=f"not installed: {QWEN_CODER.install}")
def test_the_coder_writes_python():
    model, tokenizer = QWEN_CODER.load()
    text = 'def add(a, b):\n    """Return the sum of a and b."""\n'
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    out = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert tokenizer.decode(out[0, ids.shape[1] :]).startswith("    return a + b")
