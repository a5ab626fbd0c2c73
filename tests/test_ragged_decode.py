"""Decoding over ragged heads is attention over all tokens with the evicted ones masked."""

import itertools

import pytest
import torch

from hf_kvcache.attention import causal_mask
from hf_kvcache.codecs import DenseCodec
from hf_kvcache.kernels.code_attention import pack
from hf_kvcache.kernels.decode_attention import decode_attention
from hf_kvcache.kernels.merge_states import merge_states
from hf_kvcache.kernels.ragged_attention import work_list
from hf_kvcache.segment import Segment
from hf_kvcache.stores import DeviceStore

GROUPS = (1, 3, 4, 7, 8)
DIMS = (64, 128, 256)


def draw_keep(batch: int, heads: int, tokens: int, seed: int) -> torch.Tensor:
    """A mask with another share kept of every head, at least one token, and padding on the left of every row."""
    generator = torch.Generator().manual_seed(seed)
    share = torch.rand(batch, heads, 1, generator=generator)
    keep = torch.rand(batch, heads, tokens, generator=generator) < share
    padding = torch.randint(0, tokens // 2, (batch, 1, 1), generator=generator)
    keep &= torch.arange(tokens) >= padding
    keep[..., -1] = True
    return keep


@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("group", GROUPS)
def test_ragged_decode_is_masked_attention(group, dim, queries):
    for seed, (batch, tokens, softcap) in enumerate(itertools.product((1, 3), (9, 70, 333), (0.0, 3.0))):
        generator = torch.Generator().manual_seed(seed)
        heads, recent = 3, queries + 2

        def draw(*shape, generator=generator):
            return torch.randn(*shape, generator=generator)

        keep = draw_keep(batch, heads, tokens, seed)
        key, value = draw(batch, heads, tokens + recent, dim), draw(batch, heads, tokens + recent, dim)
        query = draw(batch, heads * group, queries, dim)
        segment = Segment.seal(DenseCodec(), DeviceStore(), key[:, :, :tokens], value[:, :, :tokens], keep)
        assert torch.equal(torch.tensor(segment.lengths), keep.sum(-1))

        # as a layer does it: the sealed segment, then a dense tail, which is causal
        folded = query.reshape(batch, heads, group * queries, dim)
        causal = causal_mask(queries, recent, key.device)
        out, lse = segment.attend(folded, dim**-0.5, softcap)
        tail = decode_attention(
            folded,
            key[:, :, tokens:],
            value[:, :, tokens:],
            causal.repeat(1, 1, group, 1),
            scale=dim**-0.5,
            softcap=softcap,
        )
        out, _ = merge_states(out, lse, *tail)

        # plainly, in float64: all tokens, query head by query head
        mask = torch.cat([keep[:, :, None].expand(-1, -1, queries, -1), causal.expand(batch, heads, -1, -1)], dim=-1)
        for head in range(heads * group):
            of = head // group
            logits = query[:, head].double() @ key[:, of].double().mT * dim**-0.5
            logits = softcap * torch.tanh(logits / softcap) if softcap else logits
            expected = logits.masked_fill(~mask[:, of], -torch.inf).softmax(-1) @ value[:, of].double()
            actual = out.view(batch, heads * group, queries, dim)[:, head].double()
            assert float((actual - expected).abs().max()) <= 1e-5


def test_operators_are_registered_as_torch_wants_it():
    key, value = torch.randn(50, 16), torch.randn(50, 16)
    work, parts = work_list(torch.tensor([0, 1]), torch.tensor([0, 30]), torch.tensor([30, 50]), 2, programs=6)
    query, bias = torch.randn(1, 2, 3, 16), torch.randn(1, 2, 3)
    codes, scales = pack(torch.randint(0, 16, (50, 16), dtype=torch.uint8), 4), torch.rand(50).half()
    levels = torch.arange(16.0) - 7.5
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    for op, arguments in (
        (torch.ops.hf_kvcache.ragged_decode_attention, (query, key, value, work, parts, 0.2, 0.0)),
        (
            torch.ops.hf_kvcache.ragged_code_attention,
            (query, codes, scales, codes, scales, levels, levels, bias, work, parts, 0.2, 0.0),
        ),
    ):
        torch.library.opcheck(op.default, arguments, test_utils=tests)
