"""The plots draw what the cache holds: the right tokens, in the right place, and no numbers where there are none."""

import sys

import pytest
import torch

from hf_kvcache import AdaKV, KVSharer, SharingPlan, SnapKV, new_cache, patch_model, report
from hf_kvcache.cli import main
from hf_kvcache.plots import plot_budgets, plot_kept
from hf_kvcache.report import cache_of_file, kept_positions
from hf_kvcache.testing import left_pad, random_ids, tiny_model

pytest.importorskip("matplotlib")

SHARED = KVSharer(plan=SharingPlan.from_pairs(4, [(3, 1)]))


@torch.no_grad()
def filled(family, methods, ids, later=0, **kwargs):
    """A cache that has seen a prompt and `later` tokens, one by one."""
    model = patch_model(tiny_model(family), methods)
    cache = new_cache(model)
    model(ids, past_key_values=cache, **kwargs)
    for step in range(later):
        model(ids[:, :1] + step, past_key_values=cache)
    return cache


@pytest.fixture(scope="module")
def mixed():
    """Sliding layers 0 and 2, an evicted layer 1, and layer 3, which reads it."""
    return filled("gemma3_text", [SnapKV(window=4), AdaKV(budget=20), SHARED], random_ids(length=50), later=3)


def test_positions_are_those_of_the_entries():
    rows = [random_ids(length=length, seed=length)[0] for length in (40, 28)]
    ids, mask = left_pad(rows)
    position_ids = (mask.cumsum(-1) - 1).clamp_min(0)
    methods = [SnapKV(window=4), AdaKV(budget=20)]
    cache = filled("llama", methods, ids, attention_mask=mask, position_ids=position_ids)
    whole = filled("llama", None, ids, attention_mask=mask, position_ids=position_ids)
    for row in range(2):
        padding = int((mask[row] == 0).sum())
        kept = kept_positions(cache, row)
        for layer, every, heads in zip(cache.layers, kept_positions(whole, row), kept, strict=True):
            assert sum(len(columns) for columns in heads) == 2 * 20
            for head, columns in enumerate(heads):
                assert torch.equal(every[head], torch.arange(padding, 40))
                assert bool((columns.diff() > 0).all()) and columns[-4:].tolist() == [36, 37, 38, 39]
                # the keys found there are those of a cache that keeps all, in the first layer without any error
                if layer is cache.layers[0]:
                    full = whole.layers[0].segments[0].dense()[row][head][0]
                    torch.testing.assert_close(layer.segments[0].dense()[row][head][0], full[columns - padding])


def test_tail_window_and_consumer(mixed):
    sliding, full, _, consumer = kept_positions(mixed)
    assert [head.tolist() for head in sliding] == [list(range(46, 53))] * 2
    assert consumer == ()
    assert all(head[-7:].tolist() == list(range(46, 53)) for head in full)
    counted = [len(head) for head in full]
    assert counted == list(report(mixed).layers[1].stored) and sum(counted) == 2 * (20 + 3)


def test_while_evicting_again_and_for_beams():
    cache = filled("llama", [SnapKV(window=4, budget=16, every=4)], random_ids(batch=2, length=30), later=10)
    cache.reorder_cache(torch.tensor([1, 1]))
    for first, second in zip(kept_positions(cache, 0), kept_positions(cache, 1), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        assert all(len(head) == 16 + 2 and int(head[-1]) == 39 for head in first)


def test_budgets_are_drawn_and_consumers_are_not(mixed):
    axes = plot_budgets(mixed).axes[0]
    kept = kept_positions(mixed)
    drawn = torch.tensor(axes.images[0].get_array().filled(torch.nan))
    assert drawn.shape == (4, 2) and bool(drawn[3].isnan().all())
    torch.testing.assert_close(drawn[1], torch.tensor([len(head) / 53 for head in kept[1]]))
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["0 (window of 8)", "1", "2 (window of 8)", "3 (reads 1)"]
    assert len(axes.texts) == 6 and "of 53 seen" in axes.get_title()


def test_the_strip_shows_how_many_hold_a_token(mixed):
    tokens = [f"t{place} " for place in range(53)]
    strip, quotes = plot_kept(mixed, tokens).axes
    share = torch.cat(kept_positions(mixed)[1]).bincount(minlength=53) / 2
    corners = strip.collections[0].get_paths()[0].vertices
    heights = {int(x): 0.0 for x, _ in corners} | {int(x): y for x, y in corners if y > 0}
    assert all(heights.get(place, 0) > 0 for place in share.nonzero()[:, 0].tolist())
    assert "of the 2 (layer, KV head) pairs with full attention" in strip.get_title()
    text = quotes.texts[0].get_text()
    assert "kept most" in text and "t12 t13" in text
    assert len(plot_kept(mixed).axes) == 1
    windows = filled("mistral", None, random_ids(length=30))
    assert "8 (layer, KV head) pairs with a sliding window" in plot_kept(windows).axes[0].get_title()


def test_formulas_in_the_text_stay_text(mixed, tmp_path):
    report(mixed).plot(tmp_path / "plot.png", ["$x^2", "_{$ "] * 26 + ["$"])
    assert (tmp_path / "plot.png").stat().st_size > 10_000


@pytest.mark.parametrize("method", ["adakv", "turboquant", "offload", "kvsharer"])
def test_a_saved_cache_is_plotted_without_its_model(monkeypatch, capsys, tmp_path, method):
    methods = {"adakv": [SnapKV(window=4), AdaKV(budget=20)], "kvsharer": [SHARED]}.get(method, method)
    cache = filled("llama", methods, random_ids(length=40))
    cache.save(tmp_path / "cache.safetensors")
    again = cache_of_file(tmp_path / "cache.safetensors")
    for mine, other in zip(kept_positions(cache), kept_positions(again), strict=True):
        assert len(mine) == len(other) and all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))
    arguments = ["report", str(tmp_path / "cache.safetensors"), "--plot", str(tmp_path / "plot.png")]
    monkeypatch.setattr(sys, "argv", ["hf-kvcache", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code and "tokens seen: 40" in capsys.readouterr().out
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_mistakes_say_what_to_do(mixed, monkeypatch, capsys, tmp_path):
    with pytest.raises(ValueError, match="each of the 53 tokens that the cache has seen, got 10; pass the prompt"):
        plot_kept(mixed, ["a"] * 10)
    with pytest.raises(TypeError, match=r"got one text; use tokenizer\.batch_decode"):
        plot_kept(mixed, "a" * 53)
    with pytest.raises(ValueError, match="row must be one of the 1 rows of the batch, counted from 0, got 1"):
        plot_budgets(mixed, row=1)
    with pytest.raises(ValueError, match="the cache is empty, expected one that has seen tokens"):
        plot_budgets(new_cache(patch_model(tiny_model("llama"))))
    with pytest.raises(TypeError, match="a plot takes the KVCache of a patched model, got a list"):
        plot_budgets([])
    with pytest.raises(TypeError, match="kept_positions takes the KVCache of a patched model, got a list"):
        kept_positions([])
    SharingPlan.from_pairs(4, [(3, 1)]).save(tmp_path / "plan.safetensors")
    monkeypatch.setattr(sys, "argv", ["hf-kvcache", "report", str(tmp_path / "plan.safetensors"), "--plot", "x.png"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2 and "--plot is for a saved cache" in " ".join(capsys.readouterr().err.split())


def test_without_matplotlib_the_error_says_what_to_install(mixed, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match="pip install matplotlib"):
        plot_budgets(mixed)
