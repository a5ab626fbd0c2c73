"""A picture of a store: every page a bar over the tokens that it holds, beneath the page that it follows."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from hf_kvcache.sequential.backends import Entry
from hf_kvcache.sequential.trie import Node, build


def plot_trie(entries: Iterable[Entry], path: str | Path, title: str = "") -> None:
    """Draws the trie of a store. Tokens run to the right, branches down; a bar's colour says how often it was adopted.

    Args:
        entries: of the store (`PrefixStore.entries`).
        path: of the picture; its ending is the format.
        title: above it.
    """
    try:
        from matplotlib import colormaps
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import LogNorm
        from matplotlib.figure import Figure
    except ImportError:
        raise ModuleNotFoundError("plots need matplotlib; pip install matplotlib") from None
    roots = build(entries)
    bars = _bars(roots)
    top = max((first + height for _, first, height in bars), default=0)
    figure = Figure(figsize=(9, min(max(2.0, 0.3 * top + 1.2), 20)), layout="constrained")
    axes = figure.subplots()
    most = max((node.entry.hits for node, _, _ in bars), default=0)
    norm, colours = LogNorm(1, max(most + 1, 2)), colormaps["viridis"]
    for node, first, height in bars:
        entry = node.entry
        axes.barh(
            first + height / 2, len(entry.ids), height * 0.94, entry.start, color=colours(norm(entry.hits + 1)),
            edgecolor="white", linewidth=0.4,
        )  # fmt: skip
    axes.set_ylim(max(top, 1), 0)
    axes.set_yticks([])
    axes.set_xlabel("tokens")
    size = sum(node.entry.size for node, _, _ in bars)
    axes.set_title(f"{title}  {len(bars)} pages, {size / 1e6:.1f} MB".strip(), fontsize=10)
    figure.colorbar(ScalarMappable(norm, colours), ax=axes, label="adoptions + 1")
    figure.savefig(path, dpi=150)


def _bars(roots: list[Node]) -> list[tuple[Node, int, int]]:
    """(node, where it begins, height) of every page; the height is how many leaves a page has behind it, or 1.

    Without recursion: a long conversation is deeper than that goes.
    """
    order, waiting = [], roots[::-1]
    while waiting:
        node = waiting.pop()
        order.append(node)
        waiting += reversed(node.children)
    heights: dict[str, int] = {}
    for node in reversed(order):
        heights[node.entry.key] = max(sum(heights[child.entry.key] for child in node.children), 1)
    firsts: dict[str, int] = {}
    _stack(roots, 0, heights, firsts)
    for node in order:
        _stack(node.children, firsts[node.entry.key], heights, firsts)
    return [(node, firsts[node.entry.key], heights[node.entry.key]) for node in order]


def _stack(nodes: list[Node], first: int, heights: dict[str, int], firsts: dict[str, int]) -> None:
    """Notes where pages begin that lie one below the other."""
    for node in nodes:
        firsts[node.entry.key] = first
        first += heights[node.entry.key]
