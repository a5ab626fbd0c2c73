"""How much an eviction changes the output of attention, and the bound on it that CriticalKV minimises.

For one query head with attention weights A over n tokens, V~ = V W_O, keep-mask N and S = sum_j N_j A_j:

    L       = || o - o^ ||_1 , o^ = sum_i (N_i A_i / S) V~_i                       the actual perturbation
    theta   = C - (2 - 1/S) sum_i N_i A_i ||V~_i||_1 ,  C = sum_i A_i ||V~_i||_1   theorem 3.3: L <= theta
    theta^  = theta with S replaced by sigma <= S, the mass of the first stage      theorem 3.5: theta <= theta^

(arXiv 2502.03805). theta^ is what stage 2 minimises, given stage 1, whenever sigma > 1/2.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Perturbation:
    """The three figures for every query head, `[...]`."""

    actual: Tensor
    theta: Tensor
    theta_hat: Tensor


def perturbation_bound(
    weights: Tensor, value: Tensor, output: Tensor, keep: Tensor, first_stage: Tensor | None = None
) -> Perturbation:
    """Evaluates a selection.

    Args:
        weights: attention weights A over all tokens, `[..., n]`, each row summing to one.
        value: V, `[..., n, D]`.
        output: the rows of the output projection that belong to the head, W_O, `[..., D, hidden]`.
        keep: the selection N, boolean `[..., n]`, at least one token of every row.
        first_stage: the part of it that stage 1 took, boolean `[..., n]`; None for all of it (then theta^ = theta).

    Returns:
        L, theta and theta^, each `[...]`.

    Example:
        >>> A, V, W = torch.rand(16).softmax(-1), torch.randn(16, 8), torch.randn(8, 32)
        >>> bound = perturbation_bound(A, V, W, keep=A >= A.median())
        >>> bool(bound.actual <= bound.theta)
        True
    """
    projected = value @ output
    norm = projected.abs().sum(-1)
    kept = weights * keep
    mass = kept.sum(-1, keepdim=True)
    if bool((mass <= 0).any()):
        raise ValueError("keep leaves a row without attention; expected at least one token with a positive weight")
    actual = ((weights - kept / mass).unsqueeze(-1) * projected).sum(-2).abs().sum(-1)
    total, part = (weights * norm).sum(-1), (kept * norm).sum(-1)
    sigma = mass.squeeze(-1) if first_stage is None else (weights * first_stage).sum(-1)
    theta = total - (2 - 1 / mass.squeeze(-1)) * part
    return Perturbation(actual, theta, total - (2 - 1 / sigma) * part)
