"""The residual codec: errors bounded by its step, few bytes, and nothing believed that does not fit."""

import copy

import numpy as np
import pytest
import torch

from hf_kvcache import Sequential, patch_model
from hf_kvcache.calibration.sequential_basis import calibrate_basis
from hf_kvcache.sequential import record
from hf_kvcache.sequential.backends import Entry
from hf_kvcache.sequential.basis import Basis, gather, groups, scatter
from hf_kvcache.sequential.codes import pack_codes, unpack_codes
from hf_kvcache.sequential.identity import page_key
from hf_kvcache.sequential.packing import PageError
from hf_kvcache.sequential.page import Context, Geometry, Page
from hf_kvcache.sequential.residual import Residual
from hf_kvcache.sequential.store import PrefixStore
from hf_kvcache.sequential.trials import GEOMETRY, IDENTITY, random_page, tampered
from hf_kvcache.testing import greedy, random_ids, tiny_model


def turned(place, vectors, positions, inverse):
    """A stand-in for RoPE: turns by an angle that depends on the position."""
    angle = positions.float()[:, None] * (-0.3 if inverse else 0.3) * (place + 1)
    first, second = vectors.float().chunk(2, dim=-1)
    return torch.cat([first * angle.cos() - second * angle.sin(), first * angle.sin() + second * angle.cos()], dim=-1)


CONTEXT = Context(GEOMETRY, turned)


def likely_page(seed=0, tokens=64, start=0, dtype=torch.float32):
    """A page of few causes: what a basis can find out, in channels of very different size."""
    geometry = Geometry(GEOMETRY.producers, GEOMETRY.heads, GEOMETRY.dims, dtype)
    page = random_page(seed, tokens, start, geometry)
    mix = torch.randn(4, geometry.numbers // 2, generator=torch.Generator().manual_seed(99))
    sizes = torch.logspace(-1, 1, geometry.numbers // 2)
    positions = torch.arange(start, start + tokens)
    for kind, tensors in enumerate((page.keys, page.values)):
        causes = torch.randn(tokens, 4, generator=torch.Generator().manual_seed(seed + kind))
        channels = (causes @ mix + 0.02 * torch.randn(tokens, mix.shape[1])) * sizes + 5
        for place, own in scatter(channels, range(len(tensors)), geometry).items():
            tensors[place].copy_(turned(place, own, positions, False) if kind == 0 else own)
    return page


def basis_of(pages):
    """What calibration makes of pages."""
    from hf_kvcache.calibration.sequential_basis import Moments
    from hf_kvcache.sequential.basis import digest_of

    parts = []
    for kind in range(2):
        for members in groups(GEOMETRY):
            moments = Moments(sum(GEOMETRY.widths(members)))
            for page in pages:
                positions = torch.arange(page.start, page.start + len(page))
                keys = [turned(place, key, positions, True) for place, key in enumerate(page.keys)]
                moments.add(gather((keys, page.values)[kind], members))
            parts.append(moments.part(kind, members, GEOMETRY.widths(members)))
    return Basis("model-weights", GEOMETRY, tuple(parts), digest_of(parts))


@pytest.fixture(scope="module")
def basis():
    return basis_of([likely_page(seed, start=64 * seed) for seed in range(10, 20)])


def through_file(page, codec, context=CONTEXT):
    key = page_key(IDENTITY.root, page.ids)
    entry = Entry(key, IDENTITY.root, page.ids, page.start, codec.name, 0, 1.0)
    data = record.write(page, codec, context, entry).data
    return record.read(data, key, IDENTITY.root, {codec.name: codec}, context, b""), data


def channels_of(page):
    positions = torch.arange(page.start, page.start + len(page))
    keys = [turned(place, key, positions, True) for place, key in enumerate(page.keys)]
    return [gather(tensors, range(3)) for tensors in (keys, list(page.values))]


@pytest.mark.parametrize("high", [0, 1, 2, 7, 127, 100000])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (300, 64), (513, 5)])
def test_codes_come_back(high, shape):
    choose = np.random.default_rng(0)
    codes = choose.integers(-high, high + 1, shape).astype(np.int32)
    codes[0, 0] = -(2**31) + 1 if high else 0
    facts, sections = pack_codes(codes)
    assert np.array_equal(unpack_codes(facts, sections, shape), codes)


def test_small_codes_take_few_bytes():
    zeros, ternary = (
        np.zeros((512, 256), np.int32),
        np.random.default_rng(0).integers(-1, 2, (512, 256)).astype(np.int32),
    )
    assert sum(map(len, pack_codes(zeros)[1].values())) == 0
    assert sum(map(len, pack_codes(ternary)[1].values())) < 512 * 256 / 4.9
    # one far value does not make a whole block wide
    ternary[5, 5] = 900
    assert sum(map(len, pack_codes(ternary)[1].values())) < 512 * 256 / 4.9 + 20


@pytest.mark.parametrize("quality", [1.0, 4.0, 16.0])
@pytest.mark.parametrize("calibrated", [False, True])
def test_errors_stay_within_half_a_step(quality, calibrated, basis):
    page = likely_page(1, tokens=64, start=64)
    codec = Residual(quality, basis if calibrated else None, full=64)
    restored, _ = through_file(page, codec)
    for kind, (mine, theirs) in enumerate(zip(channels_of(restored), channels_of(page), strict=True)):
        if not calibrated:
            allowed = 0.5 / quality * theirs.std(0, correction=0) * 1.01 + 1e-2
            assert bool(((mine - theirs).abs() <= allowed).all())
        else:
            for part in (part for part in basis.parts if part.kind == kind):
                error = part.forward(mine) - part.forward(theirs)
                assert float(error.abs().max()) <= 0.5 / quality * 1.02 + 1e-2
    assert np.array_equal(restored.ids, page.ids) and restored.start == 64


def test_a_basis_saves_most_of_the_bytes(basis):
    page = likely_page(2, tokens=256, start=256)
    sizes = [len(through_file(page, Residual(4.0, own, full=256))[1]) for own in (basis, None)]
    assert sizes[0] < 0.4 * sizes[1] < 0.4 * page.flat().nbytes / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sinks_and_partial_pages_stay_in_sixteen_bit(dtype, basis):
    geometry = Geometry(GEOMETRY.producers, GEOMETRY.heads, GEOMETRY.dims, dtype)
    context = Context(geometry, turned)
    whole, tail = likely_page(3, 64, 0, dtype), likely_page(4, 20, 64, dtype)
    restored, _ = through_file(whole, Residual(1.0, basis, full=64), context)
    half = torch.bfloat16 if dtype == torch.float32 else dtype
    for mine, theirs in zip([*restored.keys, *restored.values], [*whole.keys, *whole.values], strict=True):
        assert mine.dtype == dtype and torch.equal(mine[:, :4], theirs[:, :4].to(half).to(dtype))
        assert not torch.equal(mine[:, 4:], theirs[:, 4:])
    restored, _ = through_file(tail, Residual(1.0, basis, full=64), context)
    assert torch.equal(restored.flat(), tail.flat().to(half).to(dtype))


def test_a_basis_is_saved_and_only_fits_its_model(basis, tmp_path):
    basis.save(tmp_path / "basis.safetensors")
    loaded = Basis.load(tmp_path / "basis.safetensors")
    assert loaded.digest == basis.digest and loaded.geometry.producers == basis.geometry.producers
    page = likely_page(5, 64, 64)
    mine, theirs = (through_file(page, Residual(2.0, own, full=64))[0].flat() for own in (loaded, basis))
    assert torch.equal(mine, theirs)
    _, data = through_file(page, Residual(2.0, basis, full=64))
    key = page_key(IDENTITY.root, page.ids)
    with pytest.raises(PageError, match="not with ours"):
        record.read(data, key, IDENTITY.root, {"residual": Residual(2.0, None, full=64)}, CONTEXT, b"")
    other = Context(Geometry((0, 1, 2), (2, 2, 1), (8, 8, 4), torch.float32), turned)
    with pytest.raises(PageError, match="calibrate one"):
        Residual(2.0, basis, full=64).encode(page, other)
    assert basis.nbytes == sum(2 * len(part.mean) ** 2 + 12 * len(part.mean) for part in basis.parts)


@pytest.mark.parametrize("calibrated", [False, True])
def test_tampered_pages_are_refused_or_fit(calibrated, basis):
    page, codec = likely_page(6, 12, 64), Residual(2.0, basis if calibrated else None, full=8)
    _, data = through_file(page, codec)
    key = page_key(IDENTITY.root, page.ids)
    for changed in tampered(data, 1500, seed=3):
        try:
            found = record.read(changed, key, IDENTITY.root, {"residual": codec}, CONTEXT, b"")
        except PageError:
            continue
        assert isinstance(found, Page) and [tuple(k.shape) for k in found.keys] == [(2, 12, 8), (2, 12, 8), (1, 12, 4)]


def test_calibration_finds_the_components_of_a_model():
    model = tiny_model("gemma3_text")
    texts = random_ids(batch=6, length=64)
    basis = calibrate_basis(model, texts=texts, samples=6, length=64)
    assert basis.geometry.producers == (0, 1, 2, 3) and len(basis.parts) == 2
    for part in basis.parts:
        turn = part.transform
        torch.testing.assert_close(turn.T @ turn, torch.eye(len(turn)), atol=5e-3, rtol=0)
        assert bool((part.deviation.diff() <= 1e-4).all())
    assert not hasattr(model, "_hf_kvcache")


def test_a_hit_at_high_quality_gives_the_tokens_of_a_cold_run(tmp_path):
    original, ids = tiny_model("llama"), random_ids(length=45)
    basis = calibrate_basis(original, texts=random_ids(batch=6, length=64, seed=3), samples=6, length=64)
    basis.save(tmp_path / "basis.safetensors")
    expected = greedy(patch_model(copy.deepcopy(original), None), ids)
    for chosen in (None, tmp_path / "basis.safetensors"):
        store = PrefixStore(tmp_path / f"store {chosen is None}", page_size=16)
        options = {"codec": "residual", "quality": 400.0, "basis": chosen}
        model = patch_model(copy.deepcopy(original), Sequential(store=store, **options))
        for adopted in (0, 44):
            assert torch.equal(greedy(model, ids), expected)
            store.flush()
            assert store.counts.adopted_tokens == adopted


def test_options_are_checked(tmp_path, basis):
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="belong to the codec 'residual'"):
        patch_model(model, Sequential(store=tmp_path, quality=3.0))
    with pytest.raises(ValueError, match="positive"):
        patch_model(model, Sequential(store=tmp_path, codec="residual", quality=-1.0))
    with pytest.raises(ValueError, match="made for the model"):
        patch_model(model, Sequential(store=tmp_path, codec="residual", basis=basis))
    with pytest.raises(FileNotFoundError, match="calibrate sequential"):
        patch_model(model, Sequential(store=tmp_path, codec="residual", basis=tmp_path / "none"))
