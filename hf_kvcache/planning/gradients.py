"""How much the predictions mind a change of an attention output: the curvature of the KL, by sampled gradients.

A small change d of what a layer's attention puts out moves the predictions p of the model, and

    KL(p || p') = 1/2 d^T F d + ...,     F = E_{y ~ p} [ g_y g_y^T ],     g_y = gradient of log p(y) by that output,

the Fisher information. With tokens drawn independently at every position the gradient of the sum of their log
probabilities serves all positions at once, because the expected cross terms are zero. So a handful of backward passes
prices every choice in every layer and head: 1/2 mean over the draws of (g . d)^2.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn


def output_gradients(
    model: Any,
    projections: Sequence[nn.Module],
    cache: Any,
    ids: Tensor,
    position: int,
    first: int,
    draws: int,
    seed: int,
) -> list[Tensor]:
    """Gradients of the sampled log-likelihood by what goes into every output projection.

    Args:
        model: unpatched.
        projections: W_O of every layer.
        cache: of the context, filled by `model`; it is filled further.
        ids: `[1, T]`, what follows the context.
        position: of its first token.
        first: of the predictions that count.
        draws: how many samples.
        seed: of the samples.

    Returns:
        For every projection `[draws, T - 1, width]`.
    """
    generator = torch.Generator().manual_seed(seed)
    positions = torch.arange(position, position + ids.shape[1] - 1, device=ids.device)[None]
    with torch.enable_grad(), _leaves(projections) as leaves:
        logits = model(input_ids=ids[:, :-1], past_key_values=cache, position_ids=positions).logits[0].float()
        probabilities = logits.detach()[first:].softmax(-1)
        drawn = []
        for draw in range(draws):
            tokens = torch.multinomial(probabilities.cpu(), 1, generator=generator).to(logits.device)
            # of the sum of the log-probabilities of the tokens drawn, by the logits
            by_logits = torch.zeros_like(logits)
            by_logits[first:] = -probabilities
            by_logits[first:].scatter_add_(1, tokens, torch.ones_like(tokens, dtype=by_logits.dtype))
            drawn.append(torch.autograd.grad(logits, leaves, by_logits, retain_graph=draw + 1 < draws))
    return [torch.cat([grads[layer].float() for grads in drawn]) for layer in range(len(leaves))]


@contextmanager
def _leaves(projections: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Adds a zero to the input of every projection, by which one can differentiate; yields the zeros of a forward."""
    leaves: list[Tensor] = []

    def add_leaf(module: nn.Module, args: tuple) -> tuple:
        leaves.append(torch.zeros_like(args[0], requires_grad=True))
        return (args[0].detach() + leaves[-1] if len(leaves) == 1 else args[0] + leaves[-1], *args[1:])

    hooks = [module.register_forward_pre_hook(add_leaf) for module in projections]
    try:
        yield leaves
    finally:
        for hook in hooks:
            hook.remove()


def output_projections(model: Any, adapter: Any) -> list[nn.Module]:
    """W_O of every layer of a model."""
    layers = range(len(adapter.find_layers(model)))
    return [attrgetter(adapter.output)(adapter.find_attention(model, layer)) for layer in layers]
