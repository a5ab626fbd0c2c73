"""Of tokens that score alike the first ones are kept, however wide the batch is padded."""

import pytest
import torch

from hf_kvcache.eviction.roles import Global, top_mask
from hf_kvcache.methods import AdaKV
from hf_kvcache.testing import random_observation


def padded(score, left):
    """The same scores behind places without a token."""
    return torch.cat([score.new_full((*score.shape[:-1], left), -torch.inf), score], dim=-1)


@pytest.mark.parametrize("left", [0, 1, 7, 300])
def test_the_first_of_equal_scores_are_taken(left):
    score = torch.tensor([[2.0, 1, 1, 3, 1, 1, 2], [0, 0, 0, 0, 0, 0, 0], [5, 5, 5, 1, 1, 1, 9]])
    mask = top_mask(padded(score, left), torch.tensor([5, 2, 0]))[:, left:]
    assert mask.int().tolist() == [[1, 1, 1, 1, 0, 0, 1], [1, 1, 0, 0, 0, 0, 0], [0] * 7]


@pytest.mark.parametrize(
    "allocator", [AdaKV(safeguard="floor"), AdaKV(safeguard="mix"), Global()], ids=["floor", "mix", "global"]
)
def test_heads_get_as_much_whatever_the_padding(allocator):
    # few different values, so that most are equal to others
    score = torch.randint(0, 3, (1, 4, 40), generator=torch.Generator().manual_seed(0)).float()
    limit = torch.full((1, 4), 40)
    counts = [
        allocator.allocate(padded(score, left), 11, limit, 0, random_observation()).tolist() for left in (0, 5, 60, 999)
    ]
    assert counts[0] == counts[1] == counts[2] == counts[3] and sum(counts[0][0]) == 44
