"""`convert`: an existing model becomes a YOCO or YOCO++ model, from which training then goes on.

What the layers above the middle read instead of their own keys and values is made ready in one of these ways. In all of
them the other weights are kept.

- `reuse`: the middle layer's keys and values as they are; no weight changes.
- `mean`: the key and value projections of the middle layer and of all that read it are averaged (SwiftKV, arXiv
  2410.03960), biases too.
- `ridge`: the middle layer's projections are refitted, by ridge regression from its input on calibration texts, to the
  mean of the keys (before RoPE) and values of all that read it; with an intercept where they have a bias.
- `heal`: as `reuse`, and then queries and output projections of the readers are refitted to the unmodified model's
  attention outputs, as KVSharer's healing does (`calibration.healing`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_kvcache.api import attach_plan, base_model, make_probe, require_unpatched
from hf_kvcache.calibration.probe import ModelProbe
from hf_kvcache.methods import METHODS, Yoco
from hf_kvcache.patches.adapter import replaceable
from hf_kvcache.sharing import SharingPlan

INITS = ("reuse", "mean", "ridge", "heal")
SAMPLES, LENGTH = 30, 128
RIDGE = 1e-3


def convert(
    model: nn.Module,
    method: str | Yoco = "yoco++",
    *,
    init: str = "heal",
    calibration: Sequence[str] | str | Path | Tensor | None = None,
    tokenizer: Any = None,
    **options: Any,
) -> nn.Module:
    """Converts a pretrained model in place. It needs training afterwards (examples/train_yoco.py).

    Args:
        model: an unpatched model of a supported family.
        method: `"yoco"`, `"yoco++"`, or an instance with options.
        init: how the shared keys and values are made ready; see the top of this module.
        calibration: texts for `ridge` and `heal`; None for the shipped sample.
        tokenizer: for them; None to look for one at the place the model was loaded from.
        options: of the method, e.g. `split=0.75`.

    Returns:
        The same model, patched. `save_pretrained` saves the plan with it, and
        `AutoModelForCausalLM.from_pretrained` reads both once `hf_kvcache.models` is imported.

    Raises:
        ValueError: for an unknown method, init or split.

    Example:
        >>> convert(model, "yoco++", split=0.5, init="ridge", tokenizer=tokenizer)
        >>> model.save_pretrained("converted")
    """
    if isinstance(method, str):
        kind = METHODS.get(method)
        if kind is None or not issubclass(kind, Yoco):
            raise ValueError(f"a model can be converted to yoco or yoco++, got {method!r}")
        method = kind(**options)
    elif options:
        raise ValueError(f"options {sorted(options)} go to a method that is named; set them on the instance instead")
    if init not in INITS:
        raise ValueError(f"init must be one of {', '.join(INITS)}, got {init!r}")
    target = base_model(model)
    require_unpatched(target, "a model is converted from its untouched form")
    with torch.inference_mode(False), torch.no_grad():
        probe = make_probe(target, tokenizer)
        plan = method.plan(probe.kinds)
        if init == "heal":
            probe.use_texts(calibration, SAMPLES, LENGTH)
            _bake(probe, probe.heal(SharingPlan(plan.source_layers, settings=plan.settings)))
        elif init != "reuse":
            weights = (_mean if init == "mean" else _ridge)(probe, plan, calibration)
            for own, changed in weights:
                own.copy_(changed)
    attach_plan(target, replace(plan, fingerprint=""))
    return model


def _groups(plan: SharingPlan) -> dict[int, list[int]]:
    """For every producer that others read: itself and these."""
    return {
        source: [layer for layer, other in enumerate(plan.source_layers) if other == source]
        for source in {plan.source_layers[layer] for layer in plan.consumers}
    }


def _projections(probe: ModelProbe, layer: int) -> tuple[nn.Module, nn.Module]:
    """The key and value projection of a layer."""
    attention = probe.adapter.find_attention(probe.model, layer)
    found = [getattr(attention, str(getattr(probe.adapter.kv, name, None)), None) for name in ("key", "value")]
    for module in found:
        if module is None or not replaceable(module):
            raise NotImplementedError(
                f"{type(attention).__name__} has no plain key and value projections in memory to change; "
                "use init='reuse' or init='heal'"
            )
    return found[0], found[1]


def _mean(probe: ModelProbe, plan: SharingPlan, calibration: Any) -> list[tuple[Tensor, Tensor]]:
    """For every producer that is read the weights and biases of its projections and what they become."""
    result = []
    for source, group in _groups(plan).items():
        for index, projection in enumerate(_projections(probe, source)):
            others = [_projections(probe, layer)[index] for layer in group]
            for own, *tensors in zip(*(module.parameters() for module in (projection, *others)), strict=True):
                result.append((own, torch.stack(tensors).mean(0)))
    return result


def _ridge(probe: ModelProbe, plan: SharingPlan, calibration: Any) -> list[tuple[Tensor, Tensor]]:
    """As `_mean`, by regression: W = (X^T X + r I)^-1 X^T Y for inputs X of the producer and mean outputs Y.

    Where there is a bias, X and Y are taken about their means, and the bias is what maps one mean to the other.
    """
    probe.use_texts(calibration, SAMPLES, LENGTH)
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def remember(module: nn.Module, args: tuple, output: Tensor) -> None:
        seen[module] = args[0].flatten(0, -2).float(), output.flatten(0, -2).float()

    groups = _groups(plan)
    modules = [module for group in groups.values() for layer in group for module in _projections(probe, layer)]
    hooks = [module.register_forward_hook(remember) for module in modules]
    try:
        probe.run_untouched()
    finally:
        for hook in hooks:
            hook.remove()
    result = []
    for source, group in groups.items():
        for index, projection in enumerate(_projections(probe, source)):
            inputs = seen[projection][0].double()
            wanted = torch.stack([seen[_projections(probe, layer)[index]][1] for layer in group]).mean(0).double()
            if projection.bias is None:
                result.append((projection.weight, _fit(inputs, wanted)))
                continue
            middle, target = inputs.mean(0), wanted.mean(0)
            weight = _fit(inputs - middle, wanted - target)
            result += [(projection.weight, weight), (projection.bias, target - weight @ middle)]
    return result


def _fit(inputs: Tensor, wanted: Tensor) -> Tensor:
    """The weight `[out, in]` of a ridge regression without an intercept."""
    gram = inputs.T @ inputs
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    return torch.linalg.solve(gram, inputs.T @ wanted).T


def _bake(probe: ModelProbe, plan: SharingPlan) -> None:
    """Makes healed weights the model's own."""
    decoder = probe.adapter.find_decoder(probe.model)
    for path, weight in plan.healed.items():
        own = decoder.get_submodule(path).weight
        own.copy_(weight.to(own.device, own.dtype))
