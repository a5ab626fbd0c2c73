"""What every codec promises: it attends to what it decodes to, entries can be selected, bytes are counted."""

import pytest
import torch

from hf_kvcache.codecs import (
    CODECS,
    DenseCodec,
    Fp8Codec,
    PaperTurboQuantCodec,
    TurboQuantCodec,
    UniformCodec,
    turboquant,
)
from hf_kvcache.testing import live_bytes

ALL = [
    DenseCodec(),
    Fp8Codec(),
    TurboQuantCodec(),
    TurboQuantCodec(8, 2),
    TurboQuantCodec(3, 3),
    TurboQuantCodec(2, 4, center=False),
    PaperTurboQuantCodec(),
    PaperTurboQuantCodec(2, 3, variant="prod"),
    PaperTurboQuantCodec(2.5, 3.5),
    UniformCodec(),
    UniformCodec(3, 2, group_size=32),
    UniformCodec(key_axis="token", group_size=16),
]
LOSSY = [codec for codec in ALL if not isinstance(codec, DenseCodec)]
named = {"ids": lambda codec: "-".join(str(value) for value in (codec.name, *vars(codec).values()))}
every_codec = pytest.mark.parametrize("codec", ALL, **named)
every_lossy_codec = pytest.mark.parametrize("codec", LOSSY, **named)

OWNERS, TOKENS = 4, 96


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def entries(dim: int = 64, tokens: int = TOKENS, dtype=torch.float32):
    """Keys with a mean by owner and a sink, values, and owners, of `OWNERS` x `tokens` entries."""
    key = draw(OWNERS, tokens, dim, seed=1) + 3 * draw(OWNERS, 1, dim, seed=2)
    key[:, 0] = 0.1 * draw(OWNERS, dim, seed=3)
    value = draw(OWNERS, tokens, dim, seed=4)
    return (
        key.flatten(0, 1).to(dtype),
        value.flatten(0, 1).to(dtype),
        torch.arange(OWNERS).repeat_interleave(tokens),
    )


def oracle(query, key, value, scale, softcap, mask):
    scores = query.double() @ key.double().transpose(-1, -2) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1).nan_to_num(0.0) @ value.double(), scores.logsumexp(-1)


@every_codec
def test_owners_one_after_the_other_may_come_as_a_rectangle(codec):
    key, value, owners = entries()
    listed = codec.decode(codec.encode(key, value, owners), owners)
    rectangle = owners.view(OWNERS, TOKENS)[:, :1].expand(-1, TOKENS)
    found = codec.decode(codec.encode(key, value, rectangle), owners)
    for actual, expected in zip(found, listed, strict=True):
        assert torch.equal(actual, expected)


def test_means_of_runs_are_those_of_owners():
    key, _, owners = entries()
    rectangle = owners.view(OWNERS, TOKENS)
    torch.testing.assert_close(turboquant._means_of_runs(key, rectangle), turboquant._means(key, owners, True))


@every_codec
@pytest.mark.parametrize("tokens", [64, 41])
def test_an_owner_is_encoded_as_it_is_alone(codec, tokens):
    """A row of a batch must not depend on the others, however many tokens each has."""
    key, value, owners = entries(tokens=tokens)
    keep = torch.arange(len(owners)) % 7 > 0
    keep[: tokens // 2] = True
    for kept in (torch.ones_like(keep), keep):
        key_, value_, owners_ = key[kept], value[kept], owners[kept]
        together = codec.decode(codec.encode(key_, value_, owners_), owners_)
        for owner in range(OWNERS):
            own = owners_ == owner
            none = torch.zeros(int(own.sum()), dtype=torch.long)
            alone = codec.decode(codec.encode(key_[own], value_[own], none), none)
            for mine, theirs, exact in zip(together, alone, (key_[own], value_[own]), strict=True):
                size = exact.norm(dim=1)
                other = (mine[own] - theirs).norm(dim=1) > 1e-4 * size
                # of two scales that are equally good rounding chooses, and it depends on the shape of a product
                errors = [(decoded - exact).norm(dim=1) for decoded in (mine[own], theirs)]
                as_good = (errors[0] - errors[1]).abs() <= 0.02 * errors[1] + 1e-3 * size
                assert bool((~other | as_good).all())
                assert float(other.float().mean()) <= 0.1


@every_codec
@pytest.mark.parametrize("softcap", [0.0, 4.0])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("start", "shape"), [(0, (2, 2, 96)), (96, (1, 2, 96)), (0, (12, 1, 32)), (192, (4, 1, 16))])
def test_attending_is_attending_to_what_it_decodes_to(codec, softcap, masked, start, shape):
    key, value, owners = entries()
    payload = codec.encode(key, value, owners)
    rows, heads, tokens = shape
    some = slice(start, start + rows * heads * tokens)
    dense = [tensor[some].view(*shape, -1) for tensor in codec.decode(payload, owners)]
    query = draw(rows, heads, 3, 64, seed=5)
    mask = draw(rows, heads, 3, tokens, seed=6) > 0 if masked else None
    if masked and not isinstance(codec, DenseCodec):
        mask[0, 0, 1] = False
    block_owners = owners[some][::tokens].view(rows, heads)
    out, lse = codec.attend(payload, start, shape, query, 0.1, softcap, mask, block_owners)
    exact_out, exact_lse = oracle(query, *dense, 0.1, softcap, mask)
    torch.testing.assert_close(out.double(), exact_out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)


@every_codec
@pytest.mark.parametrize("additive", [False, True])
def test_several_heads_may_read_the_same_entries(codec, additive):
    key, value, owners = entries()
    payload = codec.encode(key, value, owners)
    # the last tokens of one owner and the first ones of the next, which begins at 96
    some = slice(80, 80 + 48)
    mask = (owners[some] == torch.arange(2)[:, None])[None, :, None]
    shown = torch.zeros(mask.shape).masked_fill_(~mask, -torch.inf) if additive else mask
    query = draw(1, 2, 3, 64, seed=5)
    out, lse = codec.attend(payload, 80, (1, 1, 48), query, 0.1, 0.0, shown, torch.arange(2)[None])
    dense = [tensor[some][None, None] for tensor in codec.decode(payload, owners)]
    exact_out, exact_lse = oracle(query, *dense, 0.1, 0.0, mask)
    torch.testing.assert_close(out.double(), exact_out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)


@every_codec
def test_selected_entries_are_the_same_entries(codec):
    key, value, owners = entries()
    payload = codec.encode(key, value, owners)
    first = torch.randperm(len(key), generator=torch.Generator().manual_seed(0))[:150]
    second = torch.arange(0, 150, 3)
    twice = codec.select(codec.select(payload, first), second)
    kept = first[second]
    for actual, whole in zip(codec.decode(twice, owners[kept]), codec.decode(payload, owners), strict=True):
        torch.testing.assert_close(actual, whole[kept], rtol=1e-6, atol=1e-6)


@every_codec
def test_nothing_stays_of_entries_that_are_gone(codec):
    """Eviction while decoding joins what comes and selects what is worth keeping, again and again."""
    key, value, owners = entries(tokens=16)
    held, owner, sizes = codec.encode(key, value, owners), owners, []
    for _ in range(30):
        held = codec.join([held, codec.encode(key, value, owners, held)])
        owner = torch.cat([owner, owners])
        last = torch.cat([(owner == run).nonzero()[-24:, 0] for run in range(OWNERS)])
        held, owner = codec.select(held, last), owner[last]
        sizes.append(live_bytes(held))
    assert max(sizes[3:]) <= sizes[3]


@every_codec
@pytest.mark.parametrize("dim", [64, 80, 96, 112, 128, 192, 8])
def test_any_head_dim_comes_back(codec, dim):
    if isinstance(codec, UniformCodec) and dim % min(codec.group_size, dim):
        pytest.skip("the groups do not divide the channels, which another test says")
    if isinstance(codec, PaperTurboQuantCodec) and codec.key_bits == 2.5 and dim % 16:
        pytest.skip("too few channels for two instances")
    key, value, owners = entries(dim, tokens=70)
    decoded = codec.decode(codec.encode(key, value, owners), owners)
    for actual, exact in zip(decoded, (key, value), strict=True):
        assert actual.shape == exact.shape
        # signs of a residual cost more square error than they save: they are for inner products
        limit = 0.7 if isinstance(codec, PaperTurboQuantCodec) and codec.variant == "prod" else 0.25
        assert float((actual - exact).square().sum() / exact.square().sum()) < limit


@every_codec
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_decoded_entries_have_the_dtype_of_the_model(codec, dtype):
    key, value, owners = entries(dtype=dtype)
    payload = codec.encode(key, value, owners)
    assert {tensor.dtype for tensor in codec.decode(payload, owners)} == {dtype}
    query = draw(1, OWNERS, 2, 64).to(dtype)
    out, _ = codec.attend(payload, 0, (1, OWNERS, TOKENS), query, 0.1, 0.0, None, torch.arange(OWNERS)[None])
    # rounded when it is joined with the rest
    assert out.dtype in (dtype, torch.float32)


@pytest.mark.parametrize(("bits", "limit"), [(8, 8.3), (4, 4.3), (3, 3.3), (2, 2.3)])
def test_turboquant_holds_no_more_than_it_says(bits, limit):
    key, value, owners = entries(tokens=2048)
    payload = TurboQuantCodec(bits, bits).encode(key, value, owners)
    assert 8 * live_bytes(payload) / (key.numel() + value.numel()) <= limit


@pytest.mark.parametrize(
    ("codec", "bits"),
    [
        (PaperTurboQuantCodec(2.5, 2.5), 2.5 + 32 / 128),
        (PaperTurboQuantCodec(3.5, 3.5), 3.5 + 32 / 128),
        (PaperTurboQuantCodec(2.5, 2.5, outlier_channels=32), 2.25 + 32 / 128),
        (PaperTurboQuantCodec(3, 3), 3 + 16 / 128),
        (PaperTurboQuantCodec(3, 3, variant="prod"), 3 + 24 / 128),
    ],
    ids=["2.5", "3.5", "2.5 as printed", "mse", "prod"],
)
def test_paper_states_its_true_bits(codec, bits):
    key, value, owners = entries(dim=128, tokens=2048)
    held = 8 * live_bytes(codec.encode(key, value, owners)) / (key.numel() + value.numel())
    assert codec.bits_per_element(128) == bits
    # the order of the channels is the rest
    assert bits <= held <= bits + 0.01


@every_lossy_codec
def test_degenerate_entries(codec):
    """All zero, constant channels, one entry, a tiny and a huge one beside ordinary ones."""
    key, value, owners = entries()
    key[:, 5], value[:, 7] = 2.0, -1.0
    value[:3] = 0
    key[4], value[9] = 1e-30, 1e-30
    decoded = codec.decode(codec.encode(key, value, owners), owners)
    assert all(bool(tensor.isfinite().all()) for tensor in decoded)
    assert float(decoded[1][:3].abs().max()) <= 1e-6 or isinstance(codec, UniformCodec)
    single = codec.decode(codec.encode(key[:1], value[9:10], owners[:1]), owners[:1])
    assert all(bool(tensor.isfinite().all()) for tensor in single)
    zeros = codec.decode(codec.encode(torch.zeros(9, 64), torch.zeros(9, 64)))
    assert all(float(tensor.abs().max()) <= 1e-6 for tensor in zeros)


@every_lossy_codec
def test_numbers_too_large_for_float16_are_kept(codec):
    key, value, owners = entries()
    decoded = codec.decode(codec.encode(1e8 * key, 1e8 * value, owners), owners)
    plain = codec.decode(codec.encode(key, value, owners), owners)
    for actual, expected in zip(decoded, plain, strict=True):
        assert float((actual / 1e8 - expected).norm() / expected.norm()) < 0.05


@every_lossy_codec
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", ["key", "value"])
def test_not_a_number_is_refused(codec, bad, which):
    key, value, owners = entries()
    (key if which == "key" else value)[17, 3] = bad
    with pytest.raises(ValueError, match=f"cannot quantise a {which} with NaN or infinite numbers \\(1 of"):
        codec.encode(key, value, owners)


@pytest.mark.parametrize("codec", [TurboQuantCodec(), PaperTurboQuantCodec(), UniformCodec()], ids=lambda c: c.name)
@pytest.mark.parametrize("dim", [4, 12, 100])
def test_a_head_dim_that_does_not_fill_bytes_is_refused(codec, dim):
    with pytest.raises(ValueError, match=f"multiple of 8, got {dim}"):
        codec.encode(torch.zeros(5, dim), torch.zeros(5, dim))


def test_keys_and_values_of_two_widths_are_refused():
    with pytest.raises(ValueError, match="one width, got 64 and 32"):
        TurboQuantCodec().encode(torch.zeros(5, 64), torch.zeros(5, 32))


@pytest.mark.parametrize("codec", [TurboQuantCodec, PaperTurboQuantCodec, UniformCodec], ids=lambda c: c.name)
@pytest.mark.parametrize("bits", [0, 1, 5, 16, -4, 4.25, "4", None, True])
def test_other_widths_are_refused(codec, bits):
    with pytest.raises(ValueError, match=r"the bits of \w+ must be one of 2, .*8, got"):
        codec(bits, 4)
    with pytest.raises(ValueError, match=r"the bits of \w+ must be one of 2, .*8, got"):
        codec(4, bits)


def test_groups_must_divide_the_channels():
    with pytest.raises(ValueError, match="group_size must divide the head_dim 80 or exceed it, got 64"):
        UniformCodec().encode(torch.ones(5, 80), torch.ones(5, 80))


def test_every_codec_can_be_found_by_name():
    assert {type(codec) for codec in ALL} == set(CODECS.values())


@every_codec
def test_a_layer_may_keep_nothing(codec):
    key, value, owners = entries(tokens=8)
    nothing = codec.encode(key[:0], value[:0], owners[:0])
    some = codec.encode(key, value, owners, nothing)
    whole = codec.join([nothing, some])
    chosen = codec.select(whole, torch.arange(0))
    sizes = [{len(part[name]) for name in part if name.endswith(("codes", "key"))} for part in (nothing, whole, chosen)]
    assert sizes == [{0}, {len(key)}, {0}]


@every_codec
def test_the_last_owners_may_have_nothing_in_a_later_block(codec):
    key, value, owners = entries(tokens=32)
    first = codec.encode(key, value, owners)
    some = owners < OWNERS // 2
    later = codec.decode(codec.encode(key[some], value[some], owners[some], first), owners[some])
    for actual, whole in zip(later, codec.decode(first, owners), strict=True):
        torch.testing.assert_close(actual, whole[some], rtol=1e-4, atol=1e-4)


@every_codec
def test_owners_without_entries_can_be_selected(codec):
    key, value, owners = entries(tokens=32)
    some = owners < OWNERS // 2
    payload = codec.encode(key[some], value[some], owners[some])
    twice = torch.arange(int(some.sum())).view(OWNERS // 2, -1).repeat_interleave(2, 0).flatten()
    chosen = codec.select(payload, twice, torch.arange(OWNERS).repeat_interleave(2))
    for actual, whole in zip(
        codec.decode(chosen, owners[some][twice] * 2), codec.decode(payload, owners[some]), strict=True
    ):
        torch.testing.assert_close(actual, whole[twice], rtol=1e-6, atol=1e-6)
