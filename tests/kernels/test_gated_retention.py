"""Gated retention: chunk, parallel and recurrent forms agree, in values and gradients, at any length."""

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from hf_kvcache.kernels.gated_retention import gated_retention, gated_retention_chunked
from hf_kvcache.testing import assert_close


def inputs(length: int, dtype=torch.float32, batch=2, heads=3, key_dim=8, value_dim=6, seed=0, state=True):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    tensors = [
        draw(batch, heads, length, key_dim),
        draw(batch, heads, length, key_dim) / key_dim**0.5,
        draw(batch, heads, length, value_dim),
        torch.nn.functional.logsigmoid(draw(batch, heads, length).float()) / 4,
    ]
    if state:
        tensors.append(draw(batch, heads, key_dim, value_dim).to(torch.promote_types(dtype, torch.float32)))
    return tensors


def recurrent(query, key, value, log_decay, state) -> tuple[Tensor, Tensor]:
    """S_n = gamma_n S_(n-1) + k_n^T v_n and O_n = q_n S_n, token by token."""
    out = []
    for n in range(query.shape[2]):
        state = state * log_decay[:, :, n, None, None].exp() + key[:, :, n, :, None] * value[:, :, n, None, :]
        out.append((query[:, :, n, None, :] @ state).squeeze(2))
    return torch.stack(out, dim=2), state


def parallel(query, key, value, log_decay, state) -> tuple[Tensor, Tensor]:
    """O = (Q K^T * D) V with the whole D, and what the first state still adds."""
    total = log_decay.cumsum(-1)
    decay = (total[..., :, None] - total[..., None, :]).tril().exp().tril()
    out = (query @ key.transpose(-1, -2) * decay) @ value + (query * total.exp()[..., None]) @ state
    rest = (total[..., -1:] - total).exp()[..., None]
    return out, state * total[..., -1:, None].exp() + (key * rest).transpose(-1, -2) @ value


def close(actual: Tensor, expected: Tensor) -> None:
    """To 1e-5 of the size of the values."""
    assert float((actual - expected).abs().max() / expected.abs().max()) <= 1e-5


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 131])
@pytest.mark.parametrize("chunk", [1, 7, 64, 1024])
def test_forms_agree_at_any_length(length, chunk):
    tensors = inputs(length)
    for reference in (recurrent, parallel):
        for actual, expected in zip(gated_retention(*tensors, chunk=chunk), reference(*tensors), strict=True):
            close(actual, expected)


@pytest.mark.parametrize("length", [1, 37, 65])
@pytest.mark.parametrize("reference", [recurrent, parallel])
def test_gradients_of_the_forms_agree(length, reference):
    found = []
    for function in (lambda *tensors: gated_retention(*tensors, chunk=16), reference):
        tensors = [tensor.requires_grad_() for tensor in inputs(length)]
        out, state = function(*tensors)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        ((out * weight).sum() + state.square().sum()).backward()
        found.append([tensor.grad for tensor in tensors])
    for actual, expected in zip(*found, strict=True):
        close(actual, expected)


def test_gradient_of_the_gates_in_16_bit():
    found = []
    for dtype in (torch.bfloat16, torch.float64):
        *given, state = inputs(2048, torch.bfloat16, batch=1, heads=2)
        tensors = [tensor.to(dtype).requires_grad_() for tensor in given[:3]]
        # gates near 1, as in the model: what a token does is read by many later ones
        decay = (given[3] / 16).to(torch.promote_types(dtype, torch.float32)).requires_grad_()
        out, _ = gated_retention(*tensors, decay, state.to(decay.dtype))
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
        (out * weight.to(dtype)).sum().backward()
        found.append([tensor.grad for tensor in (*tensors, decay)])
    for (actual, expected), bound in zip(zip(*found, strict=True), (*[2.0**-8] * 3, 1e-5), strict=True):
        assert float((actual.double() - expected).norm() / expected.norm()) <= bound


def test_gradient_against_finite_differences():
    tensors = [tensor.double().requires_grad_() for tensor in inputs(5, batch=1, heads=1, key_dim=3, value_dim=2)]
    assert torch.autograd.gradcheck(lambda *args: gated_retention(*args, chunk=2), tensors)
    assert torch.autograd.gradcheck(lambda *args: gated_retention(*args, None, chunk=2)[0], tensors[:4])


def test_a_sequence_may_come_in_pieces():
    query, key, value, log_decay, state = inputs(50)
    expected, last = gated_retention(query, key, value, log_decay, state)
    pieces = []
    for start, end in ((0, 1), (1, 20), (20, 33), (33, 50)):
        part = (tensor[:, :, start:end] for tensor in (query, key, value, log_decay))
        out, state = gated_retention(*part, state, chunk=8)
        pieces.append(out)
    close(torch.cat(pieces, dim=2), expected)
    close(state, last)


def test_padding_leaves_the_state():
    query, key, value, log_decay, state = inputs(9)
    key[:, :, 3:6], log_decay[:, :, 3:6] = 0.0, 0.0
    kept = [0, 1, 2, 6, 7, 8]
    expected, last = gated_retention(*(tensor[:, :, kept] for tensor in (query, key, value, log_decay)), state)
    out, rest = gated_retention(query, key, value, log_decay, state)
    close(out[:, :, kept], expected)
    close(rest, last)


def test_strong_gates_do_not_overflow():
    query, key, value, log_decay, state = (tensor.requires_grad_() for tensor in inputs(300))
    out, last = gated_retention(query, key, value, log_decay * 1000, state, chunk=256)
    (out.sum() + last.sum()).backward()
    for tensor in (out, last, query.grad, key.grad, value.grad, log_decay.grad, state.grad):
        assert bool(torch.isfinite(tensor).all())


@pytest.mark.parametrize("length", [3, 100])
@pytest.mark.parametrize("gate", [-1e4, -1e30, torch.finfo(torch.float32).min, -torch.inf], ids=str)
def test_a_gate_that_forgets(gate, length):
    found = []
    for dtype in (torch.float32, torch.float64):
        tensors = [tensor.to(dtype).requires_grad_() for tensor in inputs(length)]
        forgets = torch.zeros(length, dtype=torch.bool)
        forgets[length // 3] = True
        decay = tensors[3].masked_fill(forgets, gate)
        form = gated_retention if dtype == torch.float32 else recurrent
        out, state = form(*tensors[:3], decay, tensors[4])
        decay.retain_grad()
        (out.square().sum() + state.square().sum()).backward()
        assert not decay.grad[..., forgets].any()
        found.append([out.detach(), state.detach(), *(tensor.grad for tensor in tensors)])
    for actual, expected in zip(*found, strict=True):
        # sums behind the gate are rounded as numbers of 104
        assert float((actual - expected).abs().max() / expected.abs().max()) <= 2e-5


@pytest.mark.parametrize("gate", [-300.0, -1e4, -torch.inf])
def test_a_gate_that_forgets_in_64_bit(gate):
    tensors = [tensor.double() for tensor in inputs(20)]
    tensors[3][:, :, 0] = gate
    for tensor in tensors[:3]:
        tensor[:, :, :19] = 0
    out, state = gated_retention(*tensors)
    exact_out, exact_state = recurrent(*tensors)
    torch.testing.assert_close(out, exact_out, rtol=1e-12, atol=0)
    torch.testing.assert_close(state, exact_state, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_accuracy_in_every_dtype(dtype):
    tensors = inputs(77, dtype)
    exact = recurrent(*(tensor.double() for tensor in tensors))[0]
    out, state = gated_retention(*tensors)
    assert out.dtype == dtype and state.dtype == torch.float32
    # sums are in float32, so the result is off by its own rounding and that of float32
    assert_close("out", out, exact, recurrent(*(tensor.float() for tensor in tensors))[0].to(dtype))


@pytest.mark.parametrize("state", [True, False])
def test_registration(state):
    tensors = [tensor.requires_grad_() for tensor in inputs(13, state=state)]
    opcheck(torch.ops.hf_kvcache.gated_retention, (*tensors, *([] if state else [None]), 4))


def test_the_operator_is_the_plain_function():
    tensors = inputs(20)
    with torch.no_grad():
        for one, other in zip(
            torch.ops.hf_kvcache.gated_retention(*tensors, 8), gated_retention_chunked(*tensors, 8), strict=True
        ):
            assert torch.equal(one, other)


@pytest.mark.parametrize("gradient", [True, False])
def test_mixed_precision_does_not_round_the_sums(gradient):
    found = []
    for mixed in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed), torch.set_grad_enabled(gradient):
            tensors = [tensor.requires_grad_(gradient) for tensor in inputs(70)]
            out, state = gated_retention(*tensors, chunk=16)
            if gradient:
                (out.square().sum() + state.square().sum()).backward()
        found.append([out, state, *(tensor.grad for tensor in tensors if gradient)])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
