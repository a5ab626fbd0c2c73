"""Pictures of what a cache holds: how many tokens every layer and head keeps, and which. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_kvcache.cache import KVCache
from hf_kvcache.layers import ConsumerLayer, SlidingLayer
from hf_kvcache.report import check_is_ours, kept_positions

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# tokens of a piece of text that is quoted, and how many are
PIECE, QUOTED = 12, 3
# the height of the mark of one, where 1 is a share of 100 %
MARK = 0.09
# cells of the heatmap that have room for their number
NUMBERED = 256
NOTHING = "0.85"
# inches, of the strip over the text without and with quotations
STRIP, STRIP_QUOTED = 3.2, 4.8


def plot_budgets(cache: KVCache, row: int = 0) -> Figure:
    """Draws how many tokens every layer and KV head holds, as a share of the tokens seen.

    A layer that reads another one's KV holds nothing: it is grey, and its label says which layer it reads. The label of
    a sliding-window layer says its window, which alone decides what it holds.

    Args:
        cache: the cache of a patched model, with at least one token in it.
        row: of the batch.

    Example:
        >>> plot_budgets(outputs.past_key_values).savefig("budgets.png")
    """
    seen = _seen(cache)
    figure = _figure(7, _height(cache))
    _draw_budgets(figure.subplots(), cache, kept_positions(cache, row), seen)
    return figure


def plot_kept(cache: KVCache, tokens: Sequence[str] | None = None, row: int = 0) -> Figure:
    """Draws along the text, for every position, the share of all (layer, KV head) pairs that hold it.

    Pairs are those of layers with full attention that hold KV of their own; only where a model has no such layer, those
    with a sliding window. Padding of the prompt is held by none.

    Args:
        cache: the cache of a patched model, with at least one token in it.
        tokens: the text of every token, as many as the cache has seen or, since the last one that `generate` gives is
            in no cache, one more. With them the pieces that are kept most and least are quoted below.
        row: of the batch.

    Example:
        >>> ids = outputs.sequences[0]
        >>> plot_kept(outputs.past_key_values, tokenizer.batch_decode(ids[:, None])).savefig("kept.png")
    """
    seen = _seen(cache)
    _check_tokens(tokens, seen)
    figure = _figure(11, STRIP if tokens is None else STRIP_QUOTED)
    _draw_kept(figure, cache, kept_positions(cache, row), seen, tokens)
    return figure


def save_plot(cache: KVCache, path: str | Path, tokens: Sequence[str] | None = None, row: int = 0) -> None:
    """Writes `plot_budgets` and `plot_kept` as one picture; the ending of `path` says which format."""
    seen = _seen(cache)
    _check_tokens(tokens, seen)
    kept = kept_positions(cache, row)
    height, strip = _height(cache), STRIP if tokens is None else STRIP_QUOTED
    figure = _figure(11, height + strip)
    upper, lower = figure.subfigures(2, 1, height_ratios=(height, strip))
    _draw_budgets(upper.subplots(), cache, kept, seen)
    _draw_kept(lower, cache, kept, seen, tokens)
    figure.savefig(path, dpi=120)


def _figure(width: float, height: float) -> Figure:
    """An empty figure that belongs to no window and needs no display."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "plots need matplotlib, which is not installed; run: pip install matplotlib"
        ) from None

    return Figure(figsize=(width, height), layout="constrained")


def _height(cache: KVCache) -> float:
    return max(0.2 * len(cache.layers), 1.5) + 1.2


def _seen(cache: KVCache) -> int:
    check_is_ours(cache, "a plot")
    seen = max(layer.seen for layer in cache.layers)
    if not seen:
        raise ValueError("the cache is empty, expected one that has seen tokens; plot it after a forward or generate")
    return seen


def _check_tokens(tokens: Sequence[str] | None, seen: int) -> None:
    if tokens is None:
        return
    if isinstance(tokens, str):
        raise TypeError(
            "tokens are the texts of the single tokens, got one text; use tokenizer.batch_decode(ids[:, None])"
        )
    if len(tokens) not in (seen, seen + 1):
        raise ValueError(
            f"expected the text of each of the {seen} tokens that the cache has seen, got {len(tokens)}; pass the "
            "prompt and the generated tokens of this row, padding included"
        )


def _draw_budgets(axes: Axes, cache: KVCache, kept: Sequence[tuple[Tensor, ...]], seen: int) -> None:
    layers, heads = len(kept), max(len(columns) for columns in kept)
    counts = torch.full((layers, heads), torch.nan)
    for layer, columns in enumerate(kept):
        counts[layer, : len(columns)] = torch.tensor([float(len(head)) for head in columns])
    shares = counts / seen
    highest = float(shares.nan_to_num().max())
    axes.set_facecolor(NOTHING)
    image = axes.imshow(shares.numpy(), aspect="auto", vmin=0, vmax=highest or 1, interpolation="nearest")
    if layers * heads <= NUMBERED:
        for layer, columns in enumerate(kept):
            for head, held in enumerate(columns):
                colour = "white" if len(held) < 0.6 * highest * seen else "black"
                axes.text(head, layer, f"{len(held)}", ha="center", va="center", color=colour, fontsize=7)
    axes.set_yticks(range(layers), [_label(cache, layer) for layer in range(layers)], fontsize=8)
    axes.set_xticks(range(heads))
    mean = float(shares.nanmean())
    axes.set(xlabel="KV head", ylabel="layer", title=f"Tokens held, of {seen:,} seen: {mean:.1%} on average")
    bar = axes.figure.colorbar(image, ax=axes, label="share of the tokens seen")
    bar.ax.yaxis.set_major_formatter("{x:.0%}")


def _label(cache: KVCache, layer: int) -> str:
    """The name of a layer beside its row."""
    own = cache.layers[layer]
    window = cache.spec.sliding_windows[layer]
    if isinstance(own, ConsumerLayer):
        return f"{layer} (reads {cache.spec.sharing.source_layers[layer]})"
    return f"{layer}" if window is None else f"{layer} (window of {window})"


def _draw_kept(
    figure: Any, cache: KVCache, kept: Sequence[tuple[Tensor, ...]], seen: int, tokens: Sequence[str] | None
) -> None:
    producers = [layer for layer, columns in enumerate(kept) if columns]
    full = [layer for layer in producers if not isinstance(cache.layers[layer], SlidingLayer)]
    pairs = [head for layer in full or producers for head in kept[layer]]
    share = torch.cat(pairs).bincount(minlength=seen) / len(pairs)
    if tokens is None:
        axes = figure.subplots()
    else:
        axes, below = figure.subplots(2, 1, height_ratios=(1.2, 1))
        below.axis("off")
    axes.fill_between(range(seen + 1), [*share.tolist(), float(share[-1])], step="post", linewidth=0)
    kinds = "full attention" if full else "a sliding window"
    axes.set(
        xlim=(0, seen),
        ylim=(0, 1.02 if tokens is None else 1.08 + 2 * QUOTED * MARK),
        xlabel="position in the text, tokens",
        ylabel="share that holds it",
        title=f"Which tokens are held by how many of the {len(pairs)} (layer, KV head) pairs with {kinds}",
    )
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axes.yaxis.set_major_formatter("{x:.0%}")
    if tokens is None:
        return
    lines: list[str] = []
    marks = 0
    titles = ("kept most, pieces aside that all pairs hold", "kept least")
    for title, prefix, pieces in zip(titles, "+-", _pieces(share), strict=True):
        lines.append(title)
        for number, start in enumerate(pieces, 1):
            end = min(start + PIECE, seen)
            mark = f"{prefix}{number}"
            axes.axvspan(start, end, alpha=0.25, color="tab:green" if prefix == "+" else "tab:red", linewidth=0)
            # each at a height of its own: neighbours must not cover one another
            axes.text((start + end) / 2, 1.03 + marks * MARK, mark, ha="center", va="bottom", fontsize=8)
            marks += 1
            text = " ".join("".join(tokens[start:end]).split())
            quoted = text if len(text) <= 90 else text[:87] + "..."
            lines.append(f"  {mark}  {float(share[start:end].mean()):4.0%}  at {start:>5}:  {quoted}")
    # no formulas: a dollar sign in the text is a dollar sign
    below.text(
        0, 1, "\n".join(lines), family="monospace", fontsize=8, va="top", transform=below.transAxes, parse_math=False
    )


def _pieces(share: Tensor) -> tuple[list[int], list[int]]:
    """Where the pieces of text begin that are kept most and least; none is both.

    Pieces that all pairs hold, as they do the window, are left out of the former.
    """
    starts = torch.arange(0, len(share), PIECE)
    means = torch.stack([share[start : start + PIECE].mean() for start in starts.tolist()])
    order = means.argsort(descending=True, stable=True)
    least = order[max(len(order) - QUOTED, len(order) // 2) :].flip(0)
    others = order[: len(order) - len(least)]
    most = others[means[others] < 1][:QUOTED]
    return starts[most].tolist(), starts[least].tolist()
