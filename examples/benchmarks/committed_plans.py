"""KVSharer's maps of SmolLM2-135M as `results/kvsharer_healing.csv` has them: no benchmark searches them again."""

from __future__ import annotations

import re
from typing import Any

from common import read_results

from hf_kvcache import KVSharer, SharingPlan, find_plan


class FixedPlan(KVSharer):
    """KVSharer without its search: the plan that is given, healed."""

    def find_plan(self, model: Any) -> SharingPlan:
        model.use_texts(self.calibration, 30, 64)
        return model.heal(self.plan)


def committed_pairs(shared: int) -> list[tuple[int, int]]:
    """(consumer, producer) of the default order's map that shares so many layers; empty when none was committed."""
    rows = read_results("kvsharer_healing")
    found = [row["plan"] for row in rows if row["order"] == "kl" and row["layers_shared"] == str(shared)]
    return [(int(a), int(b)) for a, b in re.findall(r"(\d+)<-(\d+)", found[0])] if found else []


def healed(model: Any, tokenizer: Any, pairs: list[tuple[int, int]]) -> SharingPlan:
    """A map of `model`, healed on the shipped sample."""
    plan = SharingPlan.from_pairs(model.config.num_hidden_layers, pairs)
    return find_plan(model, FixedPlan(plan=plan), tokenizer=tokenizer)
