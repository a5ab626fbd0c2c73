"""The trie of a store, measured in bits: what surprises the model in a prefix, and what two prefixes share of it.

I(s) = -log2 P_M(s) is the information of a prefix under the model, the sum of what its pages add. For prefixes s and t
let s ^ t be what they have in common.

The paper (arXiv 2604.15356) calls d_T(s, t) = I(s ^ t) a metric. It is none: it grows with likeness, and d_T(s, s) is
not zero. It is information that two sessions share, so it is named for that here; the tree metric and the ultrametric
that can be made of it are beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from hf_kvcache.sequential.backends import Entry
from hf_kvcache.sequential.identity import common_prefix


@dataclass
class Node:
    """A page on the trie.

    Args:
        entry: what the store knows of it.
        children: pages behind it.
        subtree_bytes: of the page and all behind it.
    """

    entry: Entry
    children: list[Node] = field(default_factory=list)
    subtree_bytes: int = 0


def build(entries: Iterable[Entry]) -> list[Node]:
    """The first pages of all trees, largest tree first; what is behind a page that is gone is left out."""
    nodes = {entry.key: Node(entry, subtree_bytes=entry.size) for entry in entries}
    roots = []
    # from the leaves up: a conversation is hundreds of pages deep, more than recursion bears
    for node in sorted(nodes.values(), key=lambda node: -node.entry.start):
        if node.entry.start == 0:
            roots.append(node)
        elif node.entry.parent in nodes:
            nodes[node.entry.parent].children.append(node)
            nodes[node.entry.parent].subtree_bytes += node.subtree_bytes
    for node in nodes.values():
        node.children.sort(key=lambda child: -child.subtree_bytes)
    return sorted(roots, key=lambda node: -node.subtree_bytes)


def information(bits: Sequence[float] | np.ndarray) -> float:
    """I(s) of a prefix, from the bits of its tokens (`token_bits`)."""
    return float(np.sum(bits))


def shared_information(one: Sequence[int], other: Sequence[int], bits: Sequence[float] | np.ndarray) -> float:
    """I(s ^ t): the paper's d_T. A likeness, in bits; the more, the more alike.

    Args:
        one, other: token ids of both prefixes.
        bits: of the tokens of `one`.
    """
    return information(bits[: common_prefix(one, other)])


def tree_metric(
    one: Sequence[int],
    other: Sequence[int],
    bits: Sequence[float] | np.ndarray,
    other_bits: Sequence[float] | np.ndarray,
) -> float:
    """I(s) + I(t) - 2 I(s ^ t): the bits of what either has for itself. A metric."""
    return information(bits) + information(other_bits) - 2 * shared_information(one, other, bits)


def ultrametric(one: Sequence[int], other: Sequence[int], bits: Sequence[float] | np.ndarray) -> float:
    """P_M(s ^ t) for different prefixes, 0 for equal ones. An ultrametric: d(s, u) <= max(d(s, t), d(t, u))."""
    if len(one) == len(other) == common_prefix(one, other):
        return 0.0
    return float(2.0 ** -shared_information(one, other, bits))
