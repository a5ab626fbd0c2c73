"""Fitting the basis of `sequential`'s residual codec to a model and calibration texts.

Two things are measured. The second moments of keys (without RoPE) and values say what is likely. What an error in them
does to the predictions is, to second order, the Fisher information: with labels y drawn from the model itself and g the
gradient of log P(y) with respect to the key of a head, an error e costs a KL of e^T E[g g^T] e / 2. Gradients are taken
of the second half of a window with respect to the keys and values of its first half, as a stored prompt is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_kvcache.api import is_patched, new_cache, patch_model, unpatch_model, warn_of_half_precision
from hf_kvcache.calibration.texts import Calibration, token_windows
from hf_kvcache.devices import input_device
from hf_kvcache.patches.attach import require_attached
from hf_kvcache.patches.prefix import model_facts
from hf_kvcache.progress import progress
from hf_kvcache.sequential.basis import CHANNELS, Basis, KeysValues, Part, by_head, digest_of, gather, groups
from hf_kvcache.sequential.page import Geometry
from hf_kvcache.sequential.residual import SINKS

# one window in so many is also read backwards, which takes three times as long
GRADED = 4
# what the second order predicts for a step of one in every component: KL in nats a token
KL_OF_A_STEP = 0.05
# of the mean over directions, added to every direction of a head's sensitivity: gradients of few texts miss some
FLOOR = 0.05


class Moments:
    """Sums over tokens of channels and of their products, `[C]` and `[C, C]`, in float64 and float32."""

    def __init__(self, channels: int) -> None:
        self.count, self.first = 0, torch.zeros(channels, dtype=torch.float64)
        self.second = torch.zeros(channels, channels)

    def add(self, channels: Tensor) -> None:
        self.count += len(channels)
        self.first += channels.sum(0, dtype=torch.float64)
        self.second.addmm_(channels.T, channels)

    def part(self, members: tuple[int, ...], weights: Sequence[Tensor]) -> Part:
        """The principal components of the weighed channels."""
        mean = self.first / self.count
        covariance = (self.second.double() / self.count - mean[:, None] * mean).float()
        weighed = by_head(by_head(covariance, weights).T, weights)
        values, vectors = torch.linalg.eigh((weighed + weighed.T) / 2)
        order = values.argsort(descending=True)
        return Part(members, mean.float(), tuple(weights), vectors[:, order].half().float())


def calibrate_basis(
    model: nn.Module,
    *,
    texts: Calibration = None,
    samples: int = 64,
    length: int = 1024,
    tokenizer: Any = None,
    channels: int = CHANNELS,
) -> Basis:
    """Fits a basis to a model, patched or not; a sharing plan in force is respected.

    Args:
        model: the model. An unpatched one is unpatched again.
        texts: to calibrate on, None for the shipped sample.
        samples, length: how many windows of how many tokens.
        tokenizer: None to look for one beside the model.
        channels: of a group of layers; the file has about two bytes for every pair of them.

    Example:
        >>> calibrate_basis(model, tokenizer=tokenizer).save("basis.safetensors")
        >>> patch_model(model, "sequential", store="folder", codec="residual", basis="basis.safetensors")
    """
    warn_of_half_precision(model)
    ids = token_windows(texts, model, tokenizer, samples, length, shrink=True)
    patched = is_patched(model)
    if not patched:
        patch_model(model, None)
    try:
        return fitted(model, *measured(model, ids, channels))
    finally:
        if not patched:
            unpatch_model(model)


def measured(
    model: nn.Module, ids: Tensor, channels: int = CHANNELS
) -> tuple[Geometry, dict[tuple[int, ...], Moments], tuple[list[Tensor], list[Tensor]]]:
    """Moments of every group of layers, and the sensitivity `[H, D, D]` of keys and values of every producer, the mean
    of g g^T over tokens."""
    moments: dict[tuple[int, ...], Moments] = {}
    sensitivity: list[list[Tensor]] = []
    tokens = 0
    generator = torch.Generator().manual_seed(0)
    with progress("reading texts", len(ids)) as step:
        for index, row in enumerate(ids):
            graded = index % GRADED == 0
            geometry, tensors, gradients = _read(model, row[None], generator if graded else None)
            for members in groups(geometry, channels):
                part = gather(tensors, members)
                moments.setdefault(members, Moments(part.shape[1])).add(part)
            if graded:
                products = [[g.double().transpose(1, 2) @ g.double() for g in kind] for kind in gradients]
                sensitivity = sensitivity or [[torch.zeros_like(product) for product in kind] for kind in products]
                for kind, new in zip(sensitivity, products, strict=True):
                    for total, product in zip(kind, new, strict=True):
                        total += product
                tokens += gradients[0][0].shape[1]
            step()
    for kind in sensitivity:
        for total in kind:
            total /= max(tokens, 1)
    return geometry, moments, (sensitivity[0], sensitivity[1])


def fitted(
    model: nn.Module,
    geometry: Geometry,
    moments: dict[tuple[int, ...], Moments],
    sensitivity: tuple[list[Tensor], list[Tensor]],
) -> Basis:
    """The basis of what was measured.

    A step of d rounds each of C components with a mean square error of d^2 / 12 at most. As many tokens are rounded as
    are predicted, so to second order the KL is at most C d^2 / 24 nats a token in channels weighed by the roots of the
    sensitivities; these are scaled to make it `KL_OF_A_STEP` d^2.
    """
    scale = (geometry.numbers / (24 * KL_OF_A_STEP)) ** 0.5
    weights = [[(root(product) * scale).float() for product in kind] for kind in sensitivity]
    parts = [
        found.part(members, [kind[member] for kind in weights for member in members])
        for members, found in moments.items()
    ]
    return Basis(require_attached(model).spec.fingerprint, geometry, tuple(parts), digest_of(parts))


def root(products: Tensor) -> Tensor:
    """The symmetric square roots of sensitivities `[H, D, D]`, float64, with a floor."""
    mean = products.diagonal(dim1=1, dim2=2).mean(1)
    floor = FLOOR * mean + 1e-3 * FLOOR * mean.mean() + 1e-30
    values, vectors = torch.linalg.eigh(products)
    return (vectors * (values.clamp_min(0) + floor[:, None]).sqrt()[:, None]) @ vectors.transpose(1, 2)


def _read(model: nn.Module, ids: Tensor, generator: torch.Generator | None) -> tuple[Geometry, KeysValues, KeysValues]:
    """Keys without RoPE and values `[H, n, D]` of the tokens behind the sinks and, given a generator to draw labels
    with, gradients with respect to those of the first half."""
    attachment = require_attached(model)
    decoder = attachment.adapter.find_decoder(model)
    cache = new_cache(model)
    kept: dict[int, tuple[Tensor, Tensor]] = {}
    for index, layer in cache.producers.items():
        layer.witness = partial(_keep, kept, index)
    ids = ids.to(input_device(decoder))
    half = ids.shape[1] // 2
    with torch.set_grad_enabled(generator is not None):
        if generator is None:
            decoder(input_ids=ids, past_key_values=cache, use_cache=True)
        else:
            embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
            logits = model(inputs_embeds=embedded, past_key_values=cache, use_cache=True, logits_to_keep=half).logits
            score = _drawn(logits[0], generator)
    facts = model_facts(decoder, cache, attachment.adapter, "")
    flat = [kept[producer][kind] for kind in range(2) for producer in facts.geometry.producers]
    gradients = [] if generator is None else torch.autograd.grad(score, flat)
    return facts.geometry, _plain(flat, facts, ids.shape[1]), _plain(gradients, facts, ids.shape[1] - half)


def _drawn(logits: Tensor, generator: torch.Generator) -> Tensor:
    """The log-probability of labels drawn from the model, summed over tokens."""
    log_probs = logits.float().log_softmax(-1)
    labels = torch.multinomial(log_probs.detach().exp().cpu(), 1, generator=generator)
    return log_probs.gather(-1, labels.to(log_probs.device)).sum()


def _plain(flat: Sequence[Tensor], facts: Any, end: int) -> KeysValues:
    """Keys without RoPE, and values, of the tokens from the sinks to `end`. RoPE turns gradients as it turns keys."""
    count = len(flat) // 2
    positions = torch.arange(SINKS, end)
    tensors = [tensor.detach()[0, :, SINKS:end].float().cpu() for tensor in flat]
    keys = [facts.rotate(place, key, positions, True) for place, key in enumerate(tensors[:count])]
    return keys, tensors[count:]


def _keep(kept: dict[int, tuple[Tensor, Tensor]], index: int, first: int, key: Tensor, value: Tensor) -> None:
    kept[index] = key, value
