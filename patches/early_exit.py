"""Early exit for a model whose upper layers only read the KV of lower ones.

Where only the logits of the last positions are asked for (`logits_to_keep`, which is 1 in `generate`), the upper layers
run for these positions only: no other position can influence them, since all keys and values come from below. Exact.
Three hooks on the instance: one before the language model's forward sees what is asked for, one before the decoder's
(in `attach`) makes room for the queries that eviction looks at, one before each upper layer cuts its input.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_kvcache.spec import CacheSpec

# the keyword argument in which the number travels
POSITIONS = "positions_to_keep"
# what can be asked of every layer at every position, in the call or by the configuration of a family that has it
OF_ALL = ("output_hidden_states", "output_attentions", "output_router_logits")


def ask(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """The hook before the language model's forward: says for how many last positions logits are wanted."""
    wanted = positions_wanted(model.config, **kwargs)
    if wanted > 0:
        kwargs[POSITIONS] = wanted
    return args, kwargs


def positions_wanted(config: Any, *, logits_to_keep: int | Tensor = 0, labels: Any = None, **kwargs: Any) -> int:
    """For how many last positions of a forward with these arguments anything is asked of the upper layers; 0: all."""
    # None is as good as nothing, as in transformers
    given = {name: value for name, value in kwargs.items() if value is not None}
    # bounds of packed sequences count every position
    whole = "cu_seq_lens_q" in given or any(given.get(name, getattr(config, name, False)) for name in OF_ALL)
    return logits_to_keep if isinstance(logits_to_keep, int) and labels is None and not whole else 0


def widened(wanted: int, spec: CacheSpec, mask: Tensor | None) -> int:
    """How many positions the upper layers must run for, so that eviction sees the queries that it looks at; 0: all."""
    queries = 0 if spec.scorer is None else spec.scorer.queries
    if not queries:
        return wanted if queries == 0 else 0
    # a row that ends in padding has its last queries further back
    padded = mask is not None and not bool(mask[:, -queries:].all())
    return 0 if padded else wanted + queries


def cut(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """The hook before an upper layer: cuts everything it is given to the last positions."""
    last = kwargs.pop(POSITIONS, 0)
    if last:
        if args:
            args = (args[0][:, -last:], *args[1:])
        for name, dim in (("hidden_states", 1), ("attention_mask", 2), ("position_ids", 1)):
            if isinstance(kwargs.get(name), Tensor):
                kwargs[name] = _last(kwargs[name], last, dim)
        if kwargs.get("position_embeddings") is not None:
            kwargs["position_embeddings"] = tuple(_last(table, last, 1) for table in kwargs["position_embeddings"])
    return args, kwargs


def _last(tensor: Tensor, count: int, dim: int) -> Tensor:
    length = tensor.shape[dim]
    return torch.narrow(tensor, dim, max(length - count, 0), min(count, length))
