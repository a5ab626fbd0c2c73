"""`Replay`: the highest attention that each token of a context gets when the context is read again."""

from types import SimpleNamespace

import pytest
import torch

from hf_kvcache.attention import AttentionCall
from hf_kvcache.layers.replay import Replay

HEADS, GROUP, TOKENS, DIM = 2, 2, 60, 32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=lambda dtype: str(dtype)[6:])
def test_the_scores_are_those_of_float64(dtype):
    """Also of 16-bit keys: their products, rounded to 16 bits, are off by several percent of a weight."""
    generator = torch.Generator().manual_seed(0)

    def draw(heads, tokens):
        return torch.randn(1, heads, tokens, DIM, generator=generator).to(dtype)

    key, value, new_key, new_value = (2 * draw(HEADS, tokens) for tokens in (TOKENS, TOKENS, 150, 150))
    # more than are attended at once
    query = 2 * draw(HEADS * GROUP, 150)
    replay = Replay(SimpleNamespace(key=key, value=value))
    replay.begin(10, 50)
    replay.take(new_key, new_value)
    scale = DIM**-0.5
    replay.attend(AttentionCall(torch.nn.Module(), query, None, scale, "eager"))

    keys = torch.cat([key, new_key], 2).double().repeat_interleave(GROUP, 1)
    logits = query.double() @ keys.mT * scale
    causal = torch.ones(150, TOKENS + 150, dtype=torch.bool).tril(TOKENS)
    weights = logits.masked_fill(~causal, -torch.inf).softmax(-1)[..., :TOKENS]
    expected = weights.unflatten(1, (HEADS, GROUP)).amax((2, 3))
    assert replay.score.dtype == torch.float32
    torch.testing.assert_close(replay.score[..., 10:50].double(), expected[..., 10:50], rtol=1e-4, atol=0)
    assert not replay.score[..., :10].any() and not replay.score[..., 50:].any()
