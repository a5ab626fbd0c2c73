"""The trie in bits: what two prefixes share, and the two metrics that can be made of it."""

import itertools
import math

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from hf_kvcache import patch_model
from hf_kvcache.cli import app
from hf_kvcache.plot_trie import _bars
from hf_kvcache.sequential import trie
from hf_kvcache.sequential.backends import Entry
from hf_kvcache.sequential.information import token_bits
from hf_kvcache.sequential.store import PrefixStore
from hf_kvcache.sequential.trials import IDENTITY, chain, ids_of, put_chain
from hf_kvcache.testing import random_ids, tiny_model

BITS = {
    "": [],
    "a": [1.0],
    "ab": [1.0, 2.0],
    "abc": [1.0, 2.0, 0.5],
    "abd": [1.0, 2.0, 3.0],
    "x": [4.0],
    "xab": [4, 1, 1],
}


def bits_of(word):
    return np.array(BITS[word], dtype=float)


def codes(word):
    return [ord(letter) for letter in word]


def shared(one, other):
    return trie.shared_information(codes(one), codes(other), bits_of(one))


def distance(one, other):
    return trie.tree_metric(codes(one), codes(other), bits_of(one), bits_of(other))


def likelihood(one, other):
    return trie.ultrametric(codes(one), codes(other), bits_of(one))


def test_shared_information_is_a_likeness_and_no_metric():
    assert shared("abc", "abd") == 3.0 and shared("abc", "xab") == 0.0
    assert shared("abc", "abc") == 3.5 > 0
    for one, other, third in itertools.product(BITS, repeat=3):
        assert shared(one, other) == shared(other, one)
        assert shared(one, third) >= min(shared(one, other), shared(other, third))


def test_the_tree_metric_is_a_metric():
    for one, other, third in itertools.product(BITS, repeat=3):
        assert distance(one, other) == distance(other, one)
        assert (distance(one, other) == 0) == (one == other)
        assert distance(one, third) <= distance(one, other) + distance(other, third)


def test_the_ultrametric_is_one():
    for one, other, third in itertools.product(BITS, repeat=3):
        assert likelihood(one, other) == likelihood(other, one)
        assert (likelihood(one, other) == 0) == (one == other)
        assert likelihood(one, third) <= max(likelihood(one, other), likelihood(other, third))
    assert likelihood("abc", "abd") == 2**-3


def test_bits_of_tokens_are_those_of_the_model():
    model, ids = tiny_model("llama"), random_ids(length=12)[0]
    bits = token_bits(model, ids)
    assert bits[0] == pytest.approx(math.log2(97)) and len(bits) == 12
    for place in range(1, 12):
        with torch.no_grad():
            probability = model(ids[None, :place]).logits[0, -1].double().softmax(-1)[ids[place]]
        assert bits[place] == pytest.approx(-math.log2(probability), rel=1e-4)


def test_pages_are_annotated(tmp_path):
    store, pages = PrefixStore(tmp_path, page_size=8), chain(3)
    put_chain(store, pages)
    bits = np.arange(24.0)
    assert store.annotate(IDENTITY, ids_of(pages), bits) == 3
    noted = {entry.start: entry.information for entry in store.entries()}
    assert noted == {0: sum(range(8)), 8: sum(range(8, 16)), 16: sum(range(16, 24))}
    assert store.verify() == (3, [])


def test_the_trie_is_built_from_its_pages(tmp_path):
    store = PrefixStore(tmp_path, page_size=8)
    common, branches = chain(2), [chain(2, seed, behind=2) for seed in (1, 2)]
    for branch in branches:
        put_chain(store, [*common, *branch])
    put_chain(store, chain(1, 9))
    roots = trie.build(store.entries())
    assert [root.subtree_bytes for root in roots] == sorted((root.subtree_bytes for root in roots), reverse=True)
    assert len(roots) == 2 and len(roots[0].children[0].children) == 2
    assert sum(root.subtree_bytes for root in roots) == store.backend.total()


def test_a_long_conversation_is_no_deeper_than_it_may_be(tmp_path):
    keys = [f"{index:064x}" for index in range(3001)]
    ids = np.arange(8, dtype=np.uint32)
    entries = [Entry(keys[i + 1], keys[i], ids, 8 * i, "lossless", 10 + i, 0.0) for i in range(3000)]
    fork = Entry("f" * 64, keys[2990], ids, 8 * 2990, "lossless", 5, 0.0)
    (root,) = trie.build([*entries[::-1], fork])
    assert root.subtree_bytes == sum(entry.size for entry in entries) + 5
    bars = {node.entry.key: (first, height) for node, first, height in _bars([root])}
    assert len(bars) == 3001 and bars[keys[1]] == (0, 2) and bars[keys[3000]] == (0, 1) and bars["f" * 64] == (1, 1)


def test_the_command_line_shows_checks_and_cleans(tmp_path):
    run, folder = CliRunner().invoke, str(tmp_path / "store")
    with PrefixStore(folder, page_size=8) as store:
        model, ids = patch_model(tiny_model("llama"), "sequential", store=store), random_ids(length=45)
        for _ in range(2):
            model.generate(ids, max_new_tokens=2, do_sample=False)
            store.flush()
    listed = run(app, ["store", "ls", folder, "--limit", "4"])
    assert listed.exit_code == 0 and "and 2 more" in listed.output and "lossless" in listed.output
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    picture = tmp_path / "trie.png"
    summed = run(app, ["store", "stat", folder, "--plot", str(picture)])
    assert "6 pages, 45 tokens" in summed.output and "6 adoptions" in summed.output
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert "copied 6 pages" in run(app, ["store", "export", folder, str(tmp_path / "copy")]).output
    page = next((tmp_path / "store").glob("pages/*/*"))
    page.write_bytes(page.read_bytes()[:-1])
    checked = run(app, ["store", "verify", folder])
    assert checked.exit_code == 1 and "5 pages are whole, 1 were damaged" in checked.output
    assert run(app, ["store", "gc", folder, "--limit", "1"]).exit_code == 0
    assert "0 pages" in run(app, ["store", "stat", folder]).output
    assert isinstance(run(app, ["store", "ls", str(tmp_path / "nowhere")]).exception, FileNotFoundError)


@pytest.mark.parametrize("secret", [b"word", b"word \n", b"\x00 \n"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_the_command_line_takes_the_secret_as_it_is(secret, end, tmp_path):
    run, folder, file = CliRunner().invoke, str(tmp_path / "store"), tmp_path / "secret"
    with PrefixStore(folder, page_size=8, secret=secret) as store:
        put_chain(store, chain(2))
    with pytest.warns(RuntimeWarning, match="signed"):
        checked = run(app, ["store", "verify", folder])
    assert checked.exit_code == 1 and "2 cannot be read here and are kept" in checked.output
    file.write_bytes(secret + end)
    checked = run(app, ["store", "verify", folder, "--secret", str(file)])
    assert checked.exit_code == 0 and "2 pages are whole" in checked.output
