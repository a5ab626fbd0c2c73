"""Healing of a sharing plan: refits the output projection of every consumer in closed form.

A consumer attends over keys and values that were made for another layer. What its heads then read is different, but
much of what they were meant to read can still be expressed by it. For consumer i, with

    X  the outputs of its heads over the shared KV, `[N, H_q D]`, in the model healed so far,
    Y  the attention output of the untouched model, `[N, hidden]`,
    W0 its output projection,

healing takes the ridge regression that stays near the old weights

    W = argmin ||X W^T - Y||^2 + lambda ||W - W0||^2,    lambda = strength * mean(diag(X^T X)),

layer after layer, so that every fit sees what the layers healed before it produce. It costs nothing at run time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hf_kvcache.attention import SharingContext
from hf_kvcache.progress import progress
from hf_kvcache.sharing import SharingPlan

if TYPE_CHECKING:
    from hf_kvcache.calibration.probe import Batch, ModelProbe

# windows of several lengths, since a head that is healed on short texts alone errs on long ones
WINDOWS = ((4, 1024), (8, 512), (16, 256), (32, 128))
STRENGTH = 1e-2


def heal_plan(probe: ModelProbe, plan: SharingPlan, strength: float = STRENGTH) -> SharingPlan:
    """Returns `plan` with healed output projections for its consumers.

    Args:
        probe: the untouched model and its calibration texts.
        plan: which layers share.
        strength: of the pull towards the old weights.
    """
    if plan.is_identity:
        return plan
    healed: dict[str, Tensor] = {}
    with probe.attached(), progress("healing layers", probe.num_layers) as advance:
        streams = [Stream(probe, probe.batch(*window), plan) for window in WINDOWS]
        for layer in range(probe.num_layers):
            if layer in plan.consumers:
                path = f"{probe.adapter.layers}.{layer}.{probe.adapter.attention}.{probe.adapter.output}"
                output = getattr(getattr(probe.layers[layer], probe.adapter.attention), probe.adapter.output)
                require_plain(output, path)
                fit = Ridge(output.weight)
                for stream in streams:
                    fit.add(*stream.example(layer, output))
                healed[path] = fit.solve(strength)
                with weight_of(output, healed[path]):
                    for stream in streams:
                        stream.advance_healed(layer)
            else:
                for stream in streams:
                    stream.advance(layer)
            advance()
    return replace(plan, healed=healed)


class Stream:
    """One calibration batch on its way through the untouched and the healed model, side by side."""

    def __init__(self, probe: ModelProbe, batch: Batch, plan: SharingPlan) -> None:
        self.probe, self.batch = probe, batch
        self.untouched = self.healed = batch.hidden
        self.context = SharingContext(plan)

    def example(self, layer: int, output: nn.Linear) -> tuple[Tensor, Tensor]:
        """X and Y of a consumer: the input of its output projection when healed, the output of it when untouched.

        Takes the untouched side past the layer.
        """
        with captured(output) as calls:
            self.untouched = self.probe.run_layer(layer, self.untouched, self.batch)
            self.probe.run_layer(layer, self.healed, self.batch, self.context)
        (_, wanted), (given, _) = calls
        return given, wanted if output.bias is None else wanted - output.bias

    def advance_healed(self, layer: int) -> None:
        """Takes the healed side past a layer."""
        self.healed = self.probe.run_layer(layer, self.healed, self.batch, self.context)

    def advance(self, layer: int) -> None:
        """Takes both sides past a layer that is no consumer; before the first consumer they are one."""
        same = self.healed is self.untouched
        self.advance_healed(layer)
        self.untouched = self.healed if same else self.probe.run_layer(layer, self.untouched, self.batch)


class Ridge:
    """Accumulates a ridge regression and solves it.

    Args:
        old: W0, `[out_features, in_features]`.
    """

    def __init__(self, old: Tensor) -> None:
        size = old.shape[1]
        self.old = old.detach()
        self.gram = torch.zeros(size, size, dtype=torch.float32, device=old.device)
        self.cross = torch.zeros(size, old.shape[0], dtype=torch.float32, device=old.device)

    def add(self, given: Tensor, wanted: Tensor) -> None:
        """Adds rows: given X `[..., in_features]`, wanted Y `[..., out_features]`."""
        given, wanted = given.flatten(0, -2).float(), wanted.flatten(0, -2).float()
        self.gram += given.T @ given
        self.cross += given.T @ wanted

    def solve(self, strength: float) -> Tensor:
        """W in the dtype of the old weights."""
        gram, cross, old = (tensor.double() for tensor in (self.gram, self.cross, self.old))
        pull = strength * gram.diagonal().mean()
        system = gram + pull * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        return torch.linalg.solve(system, cross + pull * old.T).T.to(self.old.dtype).contiguous()


@contextmanager
def captured(module: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Collects (input, output) of every call of a module."""
    calls: list[tuple[Tensor, Tensor]] = []
    handle = module.register_forward_hook(lambda module, args, output: calls.append((args[0], output)))
    try:
        yield calls
    finally:
        handle.remove()


@contextmanager
def weight_of(module: nn.Module, weight: Tensor) -> Iterator[None]:
    """Lets a module compute with another weight for a while."""
    old = module.weight
    module.weight = nn.Parameter(weight, requires_grad=False)
    try:
        yield
    finally:
        module.weight = old


def require_plain(module: nn.Module, path: str) -> None:
    """Raises unless a module is a plain Linear whose weight can be replaced."""
    if type(module) is not nn.Linear or module.weight.device.type == "meta":
        raise NotImplementedError(
            f"healing refits {path}, but that is a {type(module).__name__} on {module.weight.device}, and only a plain "
            "Linear in memory can be refitted; use heal=False"
        )
