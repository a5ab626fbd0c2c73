"""`Observation`: attention in parts is attention at once, and long prompts are not converted for every part."""

from dataclasses import replace

import pytest
import torch

from hf_kvcache.eviction import observation
from hf_kvcache.testing import random_observation


@pytest.mark.parametrize("holes", [0, 9])
def test_attention_in_parts_converts_the_keys_once(monkeypatch, holes):
    observed = random_observation(queries=40, holes=holes)
    observed = replace(observed, key=observed.key.bfloat16())
    whole, keys = observed.attention(), []

    def logits(query, key, *args):
        keys.append(key)
        return plain(query, key, *args)

    plain = observation.causal_logits
    monkeypatch.setattr(observation, "causal_logits", logits)
    # three queries at a time
    monkeypatch.setattr(observation, "PAIRS_AT_ONCE", 3 * 2 * 2 * 3 * 40)
    torch.testing.assert_close(torch.cat(list(observed.attention_chunks()), dim=3), whole)
    assert len(keys) == 14 and all(key is keys[0] for key in keys)
    assert keys[0].dtype == torch.float32


def test_a_gpu_scores_more_pairs_at_once():
    cpu, gpu = (observation.rows_at_once(torch.device(kind), 1 << 20) for kind in ("cpu", "cuda"))
    assert cpu == 4 and gpu > cpu
    assert observation.rows_at_once(torch.device("cpu"), 1 << 30) == 1
