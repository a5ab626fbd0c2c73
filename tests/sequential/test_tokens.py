"""Conversations as tokens: packed, or coded under the model; the cache that is made of them is the same bit for bit."""

import pytest
import torch

from hf_kvcache import compress, patch_model
from hf_kvcache.sequential import lm_coder
from hf_kvcache.sequential.archive import load_tokens, save_tokens
from hf_kvcache.sequential.lm_coder import CodedTokens
from hf_kvcache.sequential.packing import PageError
from hf_kvcache.testing import greedy, random_ids, tiny_model


@pytest.mark.parametrize("coder", ["packed", "lm"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_the_cache_is_restored_bit_for_bit(coder, family, tmp_path):
    if coder == "lm":
        pytest.importorskip("constriction", reason="constriction is not installed")
    model, ids = patch_model(tiny_model(family), None), random_ids(length=60)
    figures = save_tokens(model, ids, tmp_path / "chat", coder=coder)
    assert figures["bits"] == 8 * (tmp_path / "chat").stat().st_size / 60
    restored = load_tokens(model, tmp_path / "chat")
    assert torch.equal(restored, ids)
    for mine, theirs in zip(compress(model, restored).layers, compress(model, ids).layers, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(mine.tensors(), theirs.tensors(), strict=True))


def test_coded_bits_are_the_surprisal():
    pytest.importorskip("constriction", reason="constriction is not installed")
    model = tiny_model("llama")
    ids = torch.cat([random_ids(batch=3, length=2), greedy(model, random_ids(batch=3, length=2), tokens=120)], dim=1)
    coded = lm_coder.encode(model, ids)
    # 122 tokens a row, and up to two words to end it
    assert coded.surprisal <= coded.bits <= 1.02 * coded.surprisal + 64 / 122
    assert torch.equal(lm_coder.decode(model, coded), ids)


def test_likely_texts_take_fewer_bits_than_unlikely_ones():
    pytest.importorskip("constriction", reason="constriction is not installed")
    model, start = tiny_model("llama"), random_ids(length=2)
    likely = torch.cat([start, greedy(model, start, tokens=60)], dim=1)
    unlikely = random_ids(length=62, seed=5)
    assert lm_coder.encode(model, likely).bits < 0.7 * lm_coder.encode(model, unlikely).bits


def check_that_packed_ids_come_back(model, ids, path, monkeypatch):
    """Under a coder that fails what is saved is not coded, and needs no coder to be read."""
    assert save_tokens(model, ids, path, coder="lm")["surprisal"] == 0.0
    monkeypatch.undo()
    assert torch.equal(load_tokens(model, path), ids)


def test_a_desync_falls_back_to_packed_ids(tmp_path, monkeypatch):
    model, ids = tiny_model("llama"), random_ids(length=40)
    monkeypatch.setattr(lm_coder, "encode", lambda model, ids: CodedTokens((b"\1\2\3\4",), ids.shape[1], 3.0))
    monkeypatch.setattr(lm_coder, "decode", lambda model, coded: torch.zeros(1, coded.length, dtype=torch.long))
    check_that_packed_ids_come_back(model, ids, tmp_path / "chat", monkeypatch)


def test_a_code_that_constriction_refuses_falls_back_too(tmp_path, monkeypatch):
    pytest.importorskip("constriction", reason="constriction is not installed")
    model, ids = tiny_model("llama"), random_ids(length=40)
    monkeypatch.setattr(lm_coder, "decode", lambda *_: (_ for _ in ()).throw(AssertionError("invalid compressed data")))
    check_that_packed_ids_come_back(model, ids, tmp_path / "chat", monkeypatch)


def test_a_code_read_under_other_probabilities_is_refused(tmp_path, monkeypatch):
    pytest.importorskip("constriction", reason="constriction is not installed")
    model, ids = tiny_model("llama"), random_ids(length=40)
    assert save_tokens(model, ids, tmp_path / "chat", coder="lm")["surprisal"] > 0
    model.lm_head.weight.data.mul_(0.5)
    with pytest.raises(PageError, match=r"same dtype, device.*packed"):
        load_tokens(model, tmp_path / "chat")
    monkeypatch.setattr(lm_coder, "decode", lambda *_: (_ for _ in ()).throw(AssertionError("invalid compressed data")))
    with pytest.raises(PageError, match=r"same dtype, device.*packed"):
        load_tokens(model, tmp_path / "chat")


def test_a_long_conversation_is_saved(tmp_path):
    model, ids = tiny_model("llama"), random_ids(length=131072 + 77)
    save_tokens(model, ids, tmp_path / "chat")
    assert torch.equal(load_tokens(model, tmp_path / "chat"), ids)


def test_bad_files_are_refused(tmp_path):
    model, ids, path = tiny_model("llama"), random_ids(length=40), tmp_path / "chat"
    save_tokens(model, ids, path)
    with pytest.raises(ValueError, match="of the model"):
        load_tokens(tiny_model("llama", seed=1), path)
    data = path.read_bytes()
    for damaged in (data[:-1], data[:60], b"", bytes([*data[:40], data[40] ^ 1, *data[41:]])):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"checksum|truncated|at least"):
            load_tokens(model, path)
    with pytest.raises(ValueError, match="coder must be one of"):
        save_tokens(model, ids, path, coder="zip")
    with pytest.raises(ValueError, match="1 to"):
        save_tokens(model, ids[:, :0], path)


def test_a_missing_coder_is_named(monkeypatch, tmp_path):
    import sys

    monkeypatch.setitem(sys.modules, "constriction", None)
    with pytest.raises(ModuleNotFoundError, match="pip install constriction"):
        save_tokens(tiny_model("llama"), random_ids(length=4), tmp_path / "chat", coder="lm")
