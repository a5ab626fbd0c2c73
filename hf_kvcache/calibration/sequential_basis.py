"""Fitting the basis of `sequential`'s residual codec: second moments of keys and values over calibration texts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_kvcache.api import is_patched, new_cache, patch_model, unpatch_model
from hf_kvcache.calibration.texts import Calibration, token_windows
from hf_kvcache.patches.attach import require_attached
from hf_kvcache.patches.prefix import model_facts
from hf_kvcache.progress import progress
from hf_kvcache.sequential.basis import CHANNELS, Basis, Part, digest_of, gather, groups
from hf_kvcache.sequential.residual import SINKS


class Moments:
    """Sums over tokens of channels and of their products, `[C]` and `[C, C]`, in float64 and float32."""

    def __init__(self, channels: int) -> None:
        self.count, self.first = 0, torch.zeros(channels, dtype=torch.float64)
        self.second = torch.zeros(channels, channels)

    def add(self, channels: Tensor) -> None:
        self.count += len(channels)
        self.first += channels.sum(0, dtype=torch.float64)
        self.second.addmm_(channels.T, channels)

    def part(self, kind: int, members: tuple[int, ...], widths: Sequence[int]) -> Part:
        """The principal components of the channels, those of each of the members scaled to a mean square of one."""
        mean = self.first / self.count
        covariance = self.second.double() / self.count - mean[:, None] * mean
        sizes = [block.mean().clamp_min(1e-12).sqrt() for block in covariance.diagonal().split(list(widths))]
        scale = torch.cat([size.expand(width) for size, width in zip(sizes, widths, strict=True)])
        values, vectors = torch.linalg.eigh(covariance / (scale[:, None] * scale))
        order = values.argsort(descending=True)
        deviation = values[order].clamp_min(0).sqrt()
        return Part(kind, members, mean.float(), scale.float(), vectors[:, order].half().float(), deviation.float())


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
        channels: of a group of layers; the file has about four bytes for every pair of them.

    Example:
        >>> calibrate_basis(model, tokenizer=tokenizer).save("basis.safetensors")
        >>> patch_model(model, "sequential", store="folder", codec="residual", basis="basis.safetensors")
    """
    ids = token_windows(texts, model, tokenizer, samples, length, shrink=True)
    patched = is_patched(model)
    if not patched:
        patch_model(model, None)
    try:
        return _fit(model, ids, channels)
    finally:
        if not patched:
            unpatch_model(model)


@torch.no_grad()
def _fit(model: nn.Module, ids: Tensor, channels: int) -> Basis:
    attachment = require_attached(model)
    decoder = attachment.adapter.find_decoder(model)
    moments: dict[tuple[int, tuple[int, ...]], Moments] = {}
    positions = torch.arange(SINKS, ids.shape[1])
    with progress("reading texts", len(ids)) as step:
        for row in ids:
            cache = new_cache(model)
            kept: dict[int, tuple[Tensor, Tensor]] = {}
            for index, layer in cache.producers.items():
                layer.witness = partial(_keep, kept, index)
            decoder(input_ids=row[None].to(decoder.device), past_key_values=cache, use_cache=True)
            facts = model_facts(decoder, cache, attachment.adapter, "")
            for kind in range(2):
                tensors = [kept[producer][kind][0, :, SINKS:].float().cpu() for producer in facts.geometry.producers]
                if kind == 0:
                    tensors = [facts.rotate(place, key, positions, True) for place, key in enumerate(tensors)]
                for members in groups(facts.geometry, channels):
                    part = gather(tensors, members)
                    moments.setdefault((kind, members), Moments(part.shape[1])).add(part)
            step()
    parts = tuple(
        found.part(kind, members, facts.geometry.widths(members)) for (kind, members), found in moments.items()
    )
    return Basis(attachment.spec.fingerprint, facts.geometry, parts, digest_of(parts))


def _keep(kept: dict[int, tuple[Tensor, Tensor]], index: int, first: int, key: Tensor, value: Tensor) -> None:
    kept[index] = key.detach(), value.detach()
