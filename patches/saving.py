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

from hf_kvcache.patches.compat import writes_checkpoints
from hf_kvcache.sharing import ResidualPlan, SharingPlan

MODEL_TYPE = "needs_hf_kvcache"
ENTRY = "hf_kvcache"


def save_pretrained(
    model: nn.Module,
    plan: SharingPlan,
    save_directory: str | Path,
    is_main_process: bool = True,
    *args: Any,
    **kwargs: Any,
) -> None:
    """Takes the place of the method of that name: saves as usual, then adds the plan to `config.json`."""
    type(model).save_pretrained(model, save_directory, is_main_process, *args, **kwargs)
    if writes_checkpoints(model, is_main_process):
        add_plan(plan, save_directory)


def upload(model: nn.Module, plan: SharingPlan, working_dir: str | Path, *args: Any, **kwargs: Any) -> Any:
    """Takes the place of `_upload_modified_files`, which `push_to_hub=True` calls before the saving above is done."""
    add_plan(plan, working_dir)
    return type(model)._upload_modified_files(model, working_dir, *args, **kwargs)


def add_plan(plan: SharingPlan, folder: str | Path) -> None:
    """Adds a plan to the configuration in a folder, unless it is there already or an adapter was saved alone."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        return
    config = json.loads(path.read_text(encoding="utf-8"))
    if config["model_type"] == MODEL_TYPE:
        return
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
