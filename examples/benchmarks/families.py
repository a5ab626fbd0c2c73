"""`method=None` against the unpatched model on every supported family: greedy tokens and logits, float32.

Tiny random models, a batch with left padding, beams, and a prompt in chunks; a row is a family.

    python examples/benchmarks/families.py
"""

from __future__ import annotations

import torch
from common import write_results

from hf_kvcache import patch_model, unpatch_model
from hf_kvcache.patches.adapters import ADAPTERS
from hf_kvcache.testing import random_ids, tiny_model


def main() -> None:
    rows = []
    for family in sorted(ADAPTERS):
        model = tiny_model(family)
        ids = random_ids(batch=2, length=24)
        mask = torch.ones_like(ids)
        mask[0, :7] = 0
        calls = {
            "greedy": {},
            "beams": {"num_beams": 3},
            "chunked": {"prefill_chunk_size": 5},
        }
        kwargs = {"attention_mask": mask, "max_new_tokens": 24, "do_sample": False}
        expected = {name: model.generate(ids, **kwargs, **options) for name, options in calls.items()}
        with torch.no_grad():
            expected_logits = model(ids).logits
        patch_model(model, method=None)
        same = {
            name: torch.equal(expected[name], model.generate(ids, **kwargs, **options))
            for name, options in calls.items()
        }
        with torch.no_grad():
            difference = float((model(ids).logits - expected_logits).abs().max())
        unpatch_model(model)
        rows.append(
            {
                "family": family,
                **{f"same_tokens_{name}": value for name, value in same.items()},
                "logits_max_difference": difference,
            }
        )
    write_results("families", rows)


if __name__ == "__main__":
    main()
