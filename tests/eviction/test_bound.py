"""CriticalKV's bound: the change of the output never exceeds theta, and two stages lower its estimate."""

from dataclasses import replace

import pytest
import torch

from hf_kvcache.eviction import perturbation_bound
from hf_kvcache.eviction.roles import top_mask
from hf_kvcache.methods import CriticalKV
from hf_kvcache.testing import random_observation


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_theta_is_never_violated_and_two_stages_lower_theta_hat(norm):
    judged = 0
    for seed in range(300):
        generator = torch.Generator().manual_seed(seed)
        weights = (2.5 * torch.randn(64, generator=generator, dtype=torch.float64)).softmax(-1)
        value = torch.randn(64, 8, generator=generator, dtype=torch.float64) * torch.rand(64, 1, generator=generator)
        output = torch.randn(8, 32, generator=generator, dtype=torch.float64)
        count = int(torch.randint(2, 60, (), generator=generator))
        counts = torch.tensor([[count]])
        projection = torch.nn.Linear(8, 32, bias=False)
        projection.weight.data = output.T.float()
        observed = random_observation(batch=1, heads=1, group=1, tokens=64, dim=8)
        observed = replace(
            observed, value=value.float()[None, None], readings=[replace(observed.readings[0], output=projection)]
        )
        score = weights.float()[None, None]
        first = top_mask(score, counts // 2)[0, 0]
        for selection in (CriticalKV(norm=norm).select(score, counts, observed), top_mask(score, counts)):
            keep = selection[0, 0]
            assert int(keep.sum()) == count and bool(keep[first].all())
            bound = perturbation_bound(weights, value, output, keep)
            assert float(bound.actual) <= float(bound.theta) + 1e-9
        sigma = float(weights[first].sum())
        if norm == "l1" and sigma > 0.5:
            judged += 1
            staged, plain = (
                perturbation_bound(weights, value, output, keep[0, 0], first)
                for keep in (CriticalKV(norm=norm).select(score, counts, observed), top_mask(score, counts))
            )
            # epsilon lets a token of no attention in now and then; its part in the bound is as small
            slack = 1e-4 * float((value @ output).abs().sum(-1).max()) * count
            assert float(staged.theta) <= float(staged.theta_hat) + 1e-9
            assert float(staged.theta_hat) <= float(plain.theta_hat) + slack
    assert norm == "l2" or judged > 100


def test_the_perturbation_is_that_of_renormalised_attention():
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(30, generator=generator, dtype=torch.float64)
        value, output = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((30, 8), (8, 16)))
        keep = torch.rand(30, generator=generator) < 0.5
        full = logits.softmax(-1) @ value @ output
        evicted = logits[keep].softmax(-1) @ value[keep] @ output
        bound = perturbation_bound(logits.softmax(-1), value, output, keep)
        torch.testing.assert_close(bound.actual, (full - evicted).abs().sum())
