"""Windows and costs that nobody measured, for the tests of plans."""

import torch

from hf_kvcache.planning import Costs
from hf_kvcache.planning.windows import Question, Window
from hf_kvcache.testing import random_ids


def window(context: int = 64, seed: int = 0) -> Window:
    ids = random_ids(1, context + 40, seed)
    return Window(ids[:, :context], (Question(ids[:, context:], 0), Question(ids[:, 10:40], 5)))


def random_costs(layers: int = 2, heads: int = 2, seed: int = 0) -> Costs:
    generator = torch.Generator().manual_seed(seed)
    kept, widths = (1.0, 0.6, 0.3), ((8, 8), (4, 4))
    loss = torch.rand(layers, 2, 3, heads, generator=generator).cumsum(2).cumsum(1)
    entry = torch.tensor([[132.0, 68.0]]).expand(layers, 2)
    return Costs(kept, widths, loss, entry, torch.full((layers,), 256.0), tuple(range(layers)), "knorm", layers)
