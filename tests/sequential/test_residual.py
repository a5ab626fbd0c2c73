"""The residual codec: errors bounded by its step, few bytes, and nothing believed that does not fit."""

import copy

import numpy as np
import pytest
import torch

from hf_kvcache import Sequential, patch_model
from hf_kvcache.cache import KVCache
from hf_kvcache.calibration.sequential_basis import calibrate_basis
from hf_kvcache.fingerprint import model_digest
from hf_kvcache.patches.prefix import model_facts
from hf_kvcache.sequential import record
from hf_kvcache.sequential.backends import Entry
from hf_kvcache.sequential.basis import Basis, gather, groups, scatter
from hf_kvcache.sequential.codes import classes_of, pack_codes, unpack_codes
from hf_kvcache.sequential.identity import page_key
from hf_kvcache.sequential.packing import PageError, compress
from hf_kvcache.sequential.page import Coded, Context, Geometry, Page
from hf_kvcache.sequential.residual import SINKS, Residual
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
        both = torch.cat([channels, channels], dim=1)
        for place, own in scatter(both, tuple(range(len(tensors))), geometry)[0].items():
            tensors[place].copy_(turned(place, own, positions, False) if kind == 0 else own)
    return page


def basis_of(pages, weight=1.0):
    """What calibration makes of pages, when errors in all channels cost the same."""
    from hf_kvcache.calibration.sequential_basis import Moments
    from hf_kvcache.sequential.basis import digest_of

    parts = []
    for members in groups(GEOMETRY):
        moments = Moments(2 * sum(GEOMETRY.widths(members)))
        for page in pages:
            moments.add(gather(unrotated(page), members))
        shapes = [(GEOMETRY.heads[member], GEOMETRY.dims[member]) for member in (*members, *members)]
        parts.append(moments.part(members, [weight * torch.eye(dim).expand(heads, dim, dim) for heads, dim in shapes]))
    return Basis("model-weights", GEOMETRY, tuple(parts), digest_of(parts))


def unrotated(page):
    positions = torch.arange(page.start, page.start + len(page))
    return [turned(place, key, positions, True) for place, key in enumerate(page.keys)], list(page.values)


@pytest.fixture(scope="module")
def basis():
    return basis_of([likely_page(seed, start=64 * seed) for seed in range(10, 20)])


def through_file(page, codec, context=CONTEXT):
    key = page_key(IDENTITY.root, page.ids)
    entry = Entry(key, IDENTITY.root, page.ids, page.start, codec.name, 0, 1.0)
    data = record.write(page, codec, context, entry).data
    return record.read(data, key, IDENTITY.root, {codec.name: codec}, context, b""), data


@pytest.mark.parametrize("high", [0, 1, 2, 7, 127, 100000])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (300, 64), (513, 5), (2047, 3), (4001, 2)])
def test_codes_come_back(high, shape):
    choose = np.random.default_rng(0)
    codes = choose.integers(-high, high + 1, shape).astype(np.int32)
    codes[0, 0] = -(2**30) if high else 0
    found, classes = unpack_codes(pack_codes(codes, classes_of(codes)), shape)
    assert np.array_equal(found, codes) and np.array_equal(classes > 0, codes.any(1))


def laplace_bits(codes, sizes):
    """Bits of rounded Laplace numbers under the very law that they were drawn from."""
    size = np.abs(codes)
    zero = 1 - np.exp(-0.5 / sizes)
    other = np.exp(-size / sizes) * np.sinh(0.5 / sizes)
    return -float(np.log2(np.where(size == 0, zero, other)).sum())


def test_codes_take_the_bits_that_they_carry():
    choose = np.random.default_rng(0)
    sizes = 2.0 ** np.linspace(6, -8, 2048)[:, None]
    codes = np.round(choose.laplace(size=(2048, 256)) * sizes).astype(np.int32)
    alike = sum(len(compress(data)[1]) for data in pack_codes(codes, classes_of(codes)).values())
    assert 8 * alike < 1.02 * laplace_bits(codes, sizes) + 8 * 4096


def test_zeros_take_nothing():
    sections = pack_codes(np.zeros((512, 256), np.int32), np.zeros(512, np.uint8))
    assert sum(len(compress(data)[1]) for data in sections.values()) < 256 * 4 + 200


@pytest.mark.parametrize("quality", [1.0, 4.0, 16.0])
@pytest.mark.parametrize("calibrated", [False, True])
def test_errors_stay_within_a_step(quality, calibrated, basis):
    page = likely_page(1, tokens=64, start=64)
    codec = Residual(quality, basis if calibrated else None, full=64)
    restored, _ = through_file(page, codec)
    parts = basis.parts if calibrated else codec._parts(GEOMETRY, unrotated(page))[0]
    for part in parts:
        error = part.forward(gather(unrotated(restored), part.members))
        error -= part.forward(gather(unrotated(page), part.members))
        assert float(error.abs().max()) <= 1 / quality + 1e-2
        # most are far smaller
        assert float(error.square().mean().sqrt()) < 0.4 / quality + 1e-2


def test_a_basis_saves_most_of_the_bytes(basis):
    page = likely_page(2, tokens=256, start=256)
    sizes = [len(through_file(page, Residual(4.0, own, full=256))[1]) for own in (basis, None)]
    assert sizes[0] < 0.5 * sizes[1] < 0.2 * page.flat().nbytes / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sinks_and_partial_pages_stay_in_sixteen_bit(dtype, basis):
    geometry = Geometry(GEOMETRY.producers, GEOMETRY.heads, GEOMETRY.dims, dtype)
    context = Context(geometry, turned)
    whole, tail = likely_page(3, 64, 0, dtype), likely_page(4, 20, 64, dtype)
    restored, _ = through_file(whole, Residual(1.0, basis, full=64), context)
    half = torch.bfloat16 if dtype == torch.float32 else dtype
    for mine, theirs in zip([*restored.keys, *restored.values], [*whole.keys, *whole.values], strict=True):
        assert mine.dtype == dtype and torch.equal(mine[:, :SINKS], theirs[:, :SINKS].to(half).to(dtype))
        assert not torch.equal(mine[:, SINKS:], theirs[:, SINKS:])
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
    heads = 4 * 2 * (2 * 8**2 + 2 * 8**2 + 4**2)
    assert basis.nbytes == heads + sum(2 * len(part.mean) ** 2 + 4 * len(part.mean) for part in basis.parts)


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
    assert basis.geometry.producers == (0, 1, 2, 3) and len(basis.parts) == 1
    for part in basis.parts:
        turn = part.transform
        torch.testing.assert_close(turn.T @ turn, torch.eye(len(turn)), atol=5e-3, rtol=0)
        assert len(part.weights) == 8
        # where it counts, an error is not small in all directions of a head
        values = torch.linalg.eigvalsh(part.weights[0])
        assert bool((values > 0).all()) and float(values.max()) > 1.5 * float(values.min())
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


@pytest.mark.parametrize("codec", ["residual", "auto"])
def test_errors_do_not_grow_from_fork_to_fork(codec, tmp_path):
    """Prompts that part in the middle of a page: what they share in it is coded once, and never what was decoded."""
    store, exact = PrefixStore(tmp_path / "lossy", page_size=16), PrefixStore(tmp_path / "exact", page_size=16)
    original, shared = tiny_model("llama"), random_ids(length=14)
    model = patch_model(copy.deepcopy(original), Sequential(store=store, codec=codec, quality=2.0))
    if codec == "auto":
        model._hf_kvcache.spec.prefix.codec._decoding.update(lossless=1.0, residual=0.0)
    reference = patch_model(original, Sequential(store=exact))
    errors = []
    for seed in range(12):
        ids = torch.cat([shared, random_ids(length=6, seed=seed + 1)], dim=1)
        found = [first_page(each, ids).first(14).flat() for each in (model, reference)]
        errors.append(float((found[0] - found[1]).square().mean().sqrt()))
    assert 0 < max(errors) < 1.2 * errors[0]
    assert store.counts.adopted_tokens == 0 and exact.counts.adopted_tokens >= 11 * 14


def first_page(model, ids):
    """What the store has of the first page of a prompt that was read."""
    greedy(model, ids, tokens=2)
    attachment = model._hf_kvcache
    source = attachment.spec.prefix
    source.store.flush()
    facts = model_facts(model.model, KVCache(attachment.spec), attachment.adapter, model_digest(model.model))
    identity = source.identity(attachment.spec, facts.weights, str(model.dtype))
    match = source.store.match(identity, ids[0].numpy())[0]
    return source.store.load(match, {source.codec.name: source.codec}, Context(facts.geometry, facts.rotate))


def test_a_tail_that_stays_as_it_is_is_shared_in_part(tmp_path):
    store, ids = PrefixStore(tmp_path, page_size=16), random_ids(length=29)
    model = patch_model(tiny_model("llama"), Sequential(store=store, codec="residual", quality=2.0))
    greedy(model, ids, tokens=2)
    store.flush()
    greedy(model, torch.cat([ids[:, :26], random_ids(length=9, seed=5)], dim=1), tokens=2)
    store.flush()
    assert store.counts.adopted_tokens == 26


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


@pytest.mark.parametrize("number", [float("inf"), float("nan")])
@pytest.mark.parametrize("section", ["means", "scales"])
def test_means_and_scales_are_numbers(section, number):
    page, codec = likely_page(7, 64, 64), Residual(2.0, full=64)
    coded = codec.encode(page, CONTEXT)
    data = np.frombuffer(coded.sections[section], np.float16).copy()
    data[1] = number
    with pytest.raises(PageError, match="finite"):
        codec.decode(Coded(coded.facts, {**coded.sections, section: data.tobytes()}), page.ids, page.start, CONTEXT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("number", [float("inf"), float("nan"), 60000.0])
@pytest.mark.parametrize("calibrated", [False, True])
def test_numbers_that_codes_cannot_hold_are_kept(calibrated, number, dtype, basis):
    geometry = Geometry(GEOMETRY.producers, GEOMETRY.heads, GEOMETRY.dims, dtype)
    page = likely_page(8, 64, 64, dtype)
    page.values[1][0, 3, 2] = number
    page.keys[0][1, 9, 1] = number
    codec = Residual(4.0, basis if calibrated else None, full=64)
    restored, _ = through_file(page, codec, Context(geometry, turned))
    if number == 60000.0:
        assert bool(restored.flat().isfinite().all())
        return
    half = torch.bfloat16 if dtype == torch.float32 else dtype
    expected = page.flat().to(half).to(dtype)
    assert torch.equal(restored.flat().isnan(), expected.isnan())
    assert torch.equal(restored.flat().nan_to_num(7.0), expected.nan_to_num(7.0))


def test_means_beyond_sixteen_bit_are_kept():
    page = likely_page(8, 64, 64)
    page.values[1][0] += 1e6
    restored, _ = through_file(page, Residual(4.0, full=64))
    assert torch.equal(restored.flat(), page.flat().bfloat16().float())


def test_a_page_that_codes_do_not_shrink_stays_as_it_is():
    geometry = Geometry(GEOMETRY.producers, GEOMETRY.heads, GEOMETRY.dims, torch.bfloat16)
    page, context = random_page(3, 64, 64, geometry), Context(geometry, turned)
    restored, data = through_file(page, Residual(1e4, full=64), context)
    assert torch.equal(restored.flat(), page.flat()) and len(data) < page.flat().nbytes + 1000
    restored, coarse = through_file(random_page(3, 256, 256, geometry), Residual(1.0, full=256), context)
    assert len(coarse) < restored.flat().nbytes / 2 and not torch.equal(restored.flat(), page.flat())
