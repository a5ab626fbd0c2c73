"""The ragged operators in Triton: the kernels of `decode_attention` and `code_attention`, which take a list of work."""

from torch import Tensor

from hf_kvcache.kernels.triton_ops import code_attention, decode_attention


def ragged_decode_attention(
    query: Tensor, key: Tensor, value: Tensor, work: Tensor, parts: Tensor, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    """The operator; `NotImplemented` where `decode_attention` has no kernel."""
    if not decode_attention.takes(query, key, value):
        return NotImplemented
    return decode_attention.launch(query, key, value, None, work, parts, scale, softcap)


def ragged_code_attention(
    query: Tensor, key_codes: Tensor, key_scale: Tensor, value_codes: Tensor, value_scale: Tensor, key_levels: Tensor,
    value_levels: Tensor, bias: Tensor | None, work: Tensor, parts: Tensor, scale: float, softcap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The operator; `NotImplemented` where `code_attention` has no kernel."""
    key, value = (key_codes, key_scale, key_levels), (value_codes, value_scale, value_levels)
    if not code_attention.takes(query, key, value):
        return NotImplemented
    return code_attention.launch(query, key, value, bias, work, parts, scale, softcap)
