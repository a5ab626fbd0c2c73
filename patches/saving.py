"""Saving a model whose sharing plan is part of it (yoco, yoco++), so that it is not loaded as what it no longer is.

The checkpoint has a model type of its own, which transformers alone refuses with a message that quotes it: so the type
says what is missing. `hf_kvcache.models.shared` reads it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from hf_kvcache.sharing import ResidualPlan, SharingPlan

MODEL_TYPE = "needs_hf_kvcache"
ENTRY = "hf_kvcache"


def save_pretrained(model: nn.Module, folder: str | Path, *args: Any, **kwargs: Any) -> None:
    """Takes the place of the method of the same name: saves as usual, then writes the plan into `config.json`."""
    type(model).save_pretrained(model, folder, *args, **kwargs)
    path = Path(folder) / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    plan = model.__dict__["_hf_kvcache"].spec.sharing
    config[ENTRY] = {"model_type": config["model_type"], **described(plan)}
    config["model_type"] = MODEL_TYPE
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def described(plan: SharingPlan) -> dict[str, Any]:
    """A plan as JSON can hold it."""
    residual = plan.residual
    return {
        "source_layers": list(plan.source_layers),
        "residual": None if residual is None else {"sources": list(residual.sources), "scale": residual.scale},
        "early_exit": plan.early_exit,
        "method": plan.settings.get("method", ""),
    }


def plan_of(entry: Mapping[str, Any]) -> SharingPlan:
    """The inverse of `described`."""
    found = entry["residual"]
    residual = None if found is None else ResidualPlan(tuple(found["sources"]), found["scale"])
    settings = {"method": entry["method"]}
    return SharingPlan(
        tuple(entry["source_layers"]),
        settings=settings,
        residual=residual,
        early_exit=entry["early_exit"],
        part_of_model=True,
    )
