"""`gated_retention` in Triton, by its interpreter, against the recurrent form in float64."""

from importlib.util import find_spec

import pytest
import torch

from hf_kvcache.kernels.gated_retention import gated_retention
from hf_kvcache.testing import left_pad, random_ids
from tests.forward import logits
from tests.models.yoco import model_of

pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.usefixtures("interpreted", "no_reference"),
]
REFERENCES = ("hf_kvcache.kernels.gated_retention.decay_matrix",)


def inputs(length, key_dim=16, value_dim=24, dtype=torch.float32, batch=2, heads=2, state=True, strength=0.25):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    return (
        draw(batch, heads, length, key_dim),
        draw(batch, heads, length, key_dim) / key_dim**0.5,
        draw(batch, heads, length, value_dim),
        torch.nn.functional.logsigmoid(torch.randn(batch, heads, length, generator=generator)) * strength,
        torch.randn(batch, heads, key_dim, value_dim, generator=generator) if state else None,
    )


def oracle(query, key, value, log_decay, state):
    """Token by token, in float64."""
    query, key, value, log_decay = (tensor.double() for tensor in (query, key, value, log_decay))
    state = key.new_zeros(*key.shape[:2], key.shape[3], value.shape[3]) if state is None else state.double()
    out = []
    for n in range(query.shape[2]):
        state = state * log_decay[:, :, n, None, None].exp() + key[:, :, n, :, None] * value[:, :, n, None, :]
        out.append((query[:, :, n, None, :] @ state).squeeze(2))
    return torch.stack(out, 2), state


def check(tensors, error):
    out, state = gated_retention(*tensors)
    exact, last = oracle(*tensors)
    assert out.dtype == tensors[0].dtype and state.dtype == torch.float32
    assert not out.isnan().any() and not state.isnan().any()
    for actual, expected in ((out, exact), (state, last)):
        assert float((actual.double() - expected).norm() / expected.norm()) <= error


@pytest.mark.parametrize("length", [1, 3, 5, 31, 32, 33, 130])
@pytest.mark.parametrize("state", [True, False])
def test_any_length(length, state):
    check(inputs(length, state=state), 1e-6)


@pytest.mark.parametrize(
    "dims", [(80, 40), *(pytest.param(dims, marks=pytest.mark.slow) for dims in ((64, 128), (200, 17)))], ids=str
)
@pytest.mark.parametrize(
    "dtype,error",
    # what a weight, or a key that has faded, loses when it meets a value of 16 bits
    [(torch.float32, 1e-6), (torch.bfloat16, 2.0**-7), (torch.float16, 2.0**-10)],
    ids=lambda item: str(item)[6:] if isinstance(item, torch.dtype) else "",
)
def test_dimensions_and_dtypes(dims, dtype, error):
    check(inputs(70, *dims, dtype=dtype), error)
    check(inputs(2, *dims, dtype=dtype), error)


@pytest.mark.parametrize("state", [True, False])
@pytest.mark.parametrize("length", [64, 150, 301, 600])
def test_parts_of_a_long_text(monkeypatch, state, length):
    """Few heads: the tokens are cut, and what a part begins with is carried to it."""
    from hf_kvcache.kernels.triton_ops import gated_retention as kernels

    parts = []
    real = kernels.parts_for
    monkeypatch.setattr(kernels, "parts_for", lambda *some: parts.append(real(*some)) or parts[-1])
    check(inputs(length, batch=1, heads=1, state=state), 1e-6)
    # chunks of 32 tokens, two of them at least in a part, and six programs at once
    assert parts == [min(-(-length // 32) // 2, 6)]


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("dtype,error", [(torch.bfloat16, 2.0**-7), (torch.float16, 2.0**-10)], ids=["bf16", "fp16"])
def test_parts_in_16_bits(monkeypatch, wide, dtype, error):
    """Chunks of 64 tokens, or of 32, and a state in one program or in two."""
    from hf_kvcache.kernels.triton_ops import gated_retention as kernels

    monkeypatch.setattr(kernels, "wide_tensor_cores", lambda device: wide)
    monkeypatch.setattr(kernels, "parts_for", lambda *some: 2)
    check(inputs(165, 16, 80, dtype, batch=1), error)


def test_more_heads_than_programs():
    """No part then: the state of a head goes through all its chunks."""
    check(inputs(70, 16, 16, batch=4, heads=2), 1e-6)


def test_strong_gates_do_not_overflow():
    # the sum of 32 gates of 80 is rounded to float32, and a weight is the exponential of a difference of such sums
    check(inputs(100, strength=100.0), 32 * 80 * 2.0**-24)


@pytest.mark.parametrize("length", [3, 100])
@pytest.mark.parametrize("gate", [-1e4, -1e30, torch.finfo(torch.float32).min, -torch.inf], ids=str)
def test_a_gate_that_forgets(gate, length):
    tensors = inputs(length, batch=1)
    tensors[3][:, :, length // 3] = gate
    tensors[3][:, 1, length // 2 :: 3] = gate
    # sums behind such gates are rounded as numbers of 150, and of more with several in a chunk
    check(tensors, 6 * 150 * 2.0**-24)


def test_a_gate_that_is_no_number_is_not_hidden():
    tensors = inputs(100, batch=1, heads=1)
    tensors[3][:, :, 40] = torch.nan
    assert gated_retention(*tensors)[0][:, :, 40:].isnan().all()


def test_views():
    """Heads that a projection left between the tokens, and gates that are a slice."""
    query, key, value, log_decay, _ = inputs(40)
    query, key = (tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in (query, key))
    wide = torch.stack([log_decay, log_decay], -1)[..., 0]
    assert not query.is_contiguous() and not wide.is_contiguous()
    check((query, key, value[..., :20], wide, None), 1e-6)


def test_gates_of_16_bits():
    query, key, value, log_decay, state = inputs(70)
    check((query, key, value, log_decay.bfloat16(), state), 1e-6)


@pytest.mark.parametrize("gate,error", [(-0.1, 2e-6), (-torch.inf, 150 * 2.0**-24)])
def test_the_gradient_is_three_more_calls(gate, error):
    found = []
    for double in (False, True):
        tensors = [tensor.double() if double else tensor for tensor in inputs(37)]
        tensors[3][:, :, 20] = gate
        tensors = [tensor.requires_grad_() for tensor in tensors]
        out, state = oracle(*tensors) if double else gated_retention(*tensors)
        (out.square().sum() + state.square().sum()).backward()
        found.append([tensor.grad for tensor in tensors])
    for actual, expected in zip(*found, strict=True):
        assert float((actual.double() - expected).norm() / expected.norm()) <= error


@pytest.mark.parametrize("length", [3, 40])
def test_a_model_in_mixed_precision(length):
    """Its projections are in 16 bits and its RoPE in float32."""
    ids, mask = left_pad([random_ids(length=length)[0], random_ids(length=length - 1)[0]])
    with torch.autocast("cpu", torch.bfloat16):
        assert logits(model_of("retention"), ids, attention_mask=mask.float()).dtype == torch.bfloat16
