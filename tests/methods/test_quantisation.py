"""The methods that choose codecs: what their options become, layer by layer, and what they refuse."""

import pytest

from hf_kvcache import METHODS, CacheSpec, Fp8, TurboQuant, Uniform, patch_model
from hf_kvcache.codecs import DenseCodec, Fp8Codec, PaperTurboQuantCodec, TurboQuantCodec, UniformCodec
from hf_kvcache.testing import model_state, tiny_model

SPEC = CacheSpec.full((None,) * 6)


def codecs(method):
    """What the method puts into the slot; it asks nothing of the model."""
    return method.apply(SPEC, None).codecs


def test_defaults():
    assert codecs(TurboQuant()) == (TurboQuantCodec(4, 4, block=128),) * 6
    assert codecs(Uniform()) == (UniformCodec(4, 4, block=128),) * 6
    assert codecs(Fp8()) == (Fp8Codec(block=128),) * 6


def test_keys_and_values_may_differ():
    assert codecs(TurboQuant(bits=3, key_bits=8))[0] == TurboQuantCodec(8, 3, block=128)
    assert codecs(TurboQuant(key_bits=4, value_bits=2))[0] == TurboQuantCodec(4, 2, block=128)
    assert codecs(Uniform(bits=2, value_bits=4, key_axis="token"))[0] == UniformCodec(2, 4, "token", block=128)


def test_bits_by_layer():
    chosen = codecs(TurboQuant(bits=[16, 8, 4, 4, 3, 2]))
    assert chosen[0] == DenseCodec()
    assert [codec.key_bits for codec in chosen[1:]] == [8, 4, 4, 3, 2]
    chosen = codecs(TurboQuant(bits=2, key_bits=(8, 4, 4, 4, 4, 8)))
    assert [codec.key_bits for codec in chosen] == [8, 4, 4, 4, 4, 8]
    assert {codec.value_bits for codec in chosen} == {2}


@pytest.mark.parametrize(("bits", "kind"), [(8, TurboQuantCodec), (16, DenseCodec)])
def test_boundary_layers(bits, kind):
    chosen = codecs(TurboQuant(bits=2, boundary_layers=2, boundary_bits=bits))
    assert [isinstance(codec, TurboQuantCodec) and codec.key_bits == 2 for codec in chosen[2:4]] == [True, True]
    assert all(isinstance(codec, kind) and getattr(codec, "key_bits", 8) == 8 for codec in chosen[:2] + chosen[4:])


def test_tail_options_reach_the_codecs():
    for method in (TurboQuant, Uniform, Fp8):
        codec = codecs(method(residual_length=32, block_size=64))[0]
        assert (codec.residual_length, codec.block) == (32, 64)


def test_paper_mode():
    chosen = codecs(TurboQuant(mode="paper", variant="prod", bits=3, value_bits=2.5, seed=7, block_size=0))
    assert chosen[0] == PaperTurboQuantCodec(3, 2.5, "prod", seed=7)
    assert codecs(TurboQuant(mode="paper", bits=2.5, outlier_channels=32))[0].outlier_channels == 32


def test_all_fill_one_slot():
    with pytest.raises(ValueError, match="'fp8' sets the slot 'codec', but 'turboquant' already did"):
        Fp8().apply(TurboQuant().apply(SPEC, None), None)
    assert {"turboquant", "uniform", "fp8"} <= set(METHODS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 5}, "the bits of keys must be one of 2, 3, 4, 8, got 5"),
        ({"bits": 2.5}, "the bits of keys must be one of 2, 3, 4, 8, got 2.5"),
        ({"value_bits": 1}, "the bits of values must be one of"),
        ({"bits": [4, 4, 7]}, "must be one of 2, 3, 4, 8, got 7"),
        ({"key_bits": 16}, "16 bits are for keys and values together, got 16 and 4"),
        ({"mode": "fast"}, "mode must be one of practical, paper, got 'fast'"),
        ({"variant": "prod"}, "belong to mode='paper'"),
        ({"mode": "paper", "variant": "prod", "bits": 3.5}, "the bits of keys must be one of 2, 3, 4, got 3.5"),
        ({"mode": "paper", "outlier_channels": 32}, "outlier_channels belongs to 2.5 and 3.5 bits"),
        ({"boundary_bits": 4}, "boundary_bits must be 8 or 16, got 4"),
        ({"boundary_layers": -1}, "boundary_layers must not be negative"),
        ({"residual_length": -1}, "residual_length must be a number of tokens, 0 or more, got -1"),
        ({"block_size": 0.5}, "block_size must be a number of tokens, 0 or more, got 0.5"),
    ],
    ids=str,
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        TurboQuant(**options)


def test_options_that_do_not_fit_the_model_are_refused():
    with pytest.raises(ValueError, match="one number or one for each of 6 layers, got 3"):
        codecs(TurboQuant(bits=[4, 4, 4]))
    with pytest.raises(ValueError, match="at most half of the model's 6 layers, got 4"):
        codecs(TurboQuant(boundary_layers=4))


@pytest.mark.parametrize(
    ("method", "dim", "message"),
    [
        (TurboQuant(), 12, "multiple of 8, got 12"),
        (TurboQuant(mode="paper"), 12, "multiple of 8, got 12"),
        (TurboQuant(mode="paper", bits=2.5, outlier_channels=60), 64, "between 8 and 56 at head_dim 64, got 60"),
        (Uniform(), 12, "multiple of 8, got 12"),
        (Uniform(group_size=48), 64, "group_size must divide the head_dim 64 or exceed it, got 48"),
    ],
    ids=str,
)
def test_heads_that_a_codec_does_not_fit_are_refused_before_a_forward(method, dim, message):
    model = tiny_model("llama", head_dim=dim)
    before = model_state(model)
    with pytest.raises(ValueError, match=message):
        patch_model(model, method)
    model_state(model).assert_equal(before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 6}, "the bits of keys must be one of"),
        ({"key_axis": "head"}, "key_axis must be one of channel, token, got 'head'"),
        ({"group_size": 4}, "group_size must be a whole number of at least 8, got 4"),
        ({"residual_length": -3}, "residual_length"),
    ],
    ids=str,
)
def test_wrong_options_of_uniform_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Uniform(**options)
