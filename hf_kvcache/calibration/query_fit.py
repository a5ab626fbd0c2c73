"""Refitting a consumer's query projection to foreign keys.

Let p_t be the attention weights of the untouched layer for query t, and z_t(W) the scores of the refitted query against
the shared keys. W minimises

    mean over t and heads of  KL(p_t || softmax(z_t(W)))  +  strength / rows(W) * ||(W - W0) L||^2,

L L^T being the covariance of the layer's inputs: a multinomial logistic regression, convex in W (where the family does
not normalise its queries), solved by L-BFGS from the old weights in the coordinates V = W L, in which the inputs are
white. RoPE, biases and norms are the model's own: the attention module itself computes the queries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_kvcache.attention import AttentionCall, SharingContext, causal_mask

QUERIES = 2048
ITERATIONS = 20
STRENGTH = 1e-3
DAMPING = 1e-5


@dataclass(frozen=True)
class AttentionExample:
    """One calibration batch at one layer.

    Args:
        inputs: what the attention module is called with in the healed model (`args` and `kwargs`).
        key: the shared keys that it reads, `[B, H_kv, T, D]`.
        wanted_call: the attention call of the untouched layer.
        wanted_key: the keys of the untouched layer, `[B, H_kv, T, D]`.
    """

    inputs: dict[str, Any]
    key: Tensor
    wanted_call: AttentionCall
    wanted_key: Tensor

    @property
    def hidden(self) -> Tensor:
        """Input of the projections, `[B, T, hidden]`."""
        return self.inputs["args"][0] if self.inputs["args"] else self.inputs["kwargs"]["hidden_states"]


class QueryReached(Exception):
    """Ends an attention forward as soon as its query is known."""

    def __init__(self, query: Tensor) -> None:
        super().__init__("query reached")
        self.query = query


class StopAtQuery(SharingContext):
    """Ends the forward where it would attend."""

    def resolve(self, call: AttentionCall, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        raise QueryReached(call.query)


def fit_query(attention: nn.Module, name: str, examples: list[AttentionExample]) -> Tensor:
    """Returns the refitted weight of the projection `name` of `attention`, `[H_q D, hidden]`, in its dtype."""
    old = getattr(attention, name).weight.detach()
    tokens = sum(example.hidden.shape[0] * example.hidden.shape[1] for example in examples)
    stride = max(1, round(tokens / QUERIES))
    # offset, so that the first query, which sees one token only, is not among them
    chosen = [torch.arange(stride // 2 + 1, example.hidden.shape[1], stride) for example in examples]
    targets = [
        scores(example.wanted_call, example.wanted_call.query, example.wanted_key, rows).softmax(-1)
        for example, rows in zip(examples, chosen, strict=True)
    ]
    rows_total = sum(target.shape[0] * target.shape[1] * target.shape[2] for target in targets)
    basis = whitening(examples)
    start = old.float() @ basis
    white = start.clone().requires_grad_(True)
    optimizer = torch.optim.LBFGS([white], max_iter=ITERATIONS, history_size=10, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        weight = torch.linalg.solve_triangular(basis, white, upper=False, left=False)
        loss = STRENGTH * (white - start).square().sum() / len(old)
        for example, rows, target in zip(examples, chosen, targets, strict=True):
            query = query_with(attention, name, weight.to(old.dtype), example)
            log_probs = scores(example.wanted_call, query, example.key, rows).log_softmax(-1)
            loss = loss - (target * log_probs.clamp_min(-60)).sum() / rows_total
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return torch.linalg.solve_triangular(basis, white.detach(), upper=False, left=False).to(old.dtype).contiguous()


def query_with(attention: nn.Module, name: str, weight: Tensor, example: AttentionExample) -> Tensor:
    """The post-RoPE query `[B, H_q, T, D]` that the attention module makes with another query weight."""
    kwargs = {**example.inputs["kwargs"], "kv_sharing": StopAtQuery(example.inputs["kwargs"]["kv_sharing"].plan)}
    try:
        torch.func.functional_call(attention, {f"{name}.weight": weight}, example.inputs["args"], kwargs)
    except QueryReached as reached:
        return reached.query
    raise RuntimeError(f"{type(attention).__name__} did not attend")


def scores(call: AttentionCall, query: Tensor, key: Tensor, rows: Tensor) -> Tensor:
    """Masked attention scores of some queries, `[B, H_q, rows, T]`, in float32."""
    batch, heads, length, dim = query.shape
    key, rows = key.to(query.device), rows.to(query.device)
    folded = query[:, :, rows].reshape(batch, key.shape[1], -1, dim)
    result = (folded.float() @ key.float().transpose(-1, -2)).view(batch, heads, len(rows), -1) * call.scale
    if call.softcap:
        result = torch.tanh(result / call.softcap) * call.softcap
    mask = causal_mask(length, length, query.device) if call.mask is None else call.mask
    return result.masked_fill(~mask[:, :, rows.to(mask.device)], torch.finfo(result.dtype).min)


def whitening(examples: list[AttentionExample]) -> Tensor:
    """L, the lower Cholesky factor of the inputs' covariance, `[hidden, hidden]`."""
    inputs = torch.cat([example.hidden.flatten(0, 1).float() for example in examples])
    covariance = inputs.T @ inputs / len(inputs)
    covariance += DAMPING * covariance.diagonal().mean() * torch.eye(len(covariance), device=covariance.device)
    return torch.linalg.cholesky(covariance)
