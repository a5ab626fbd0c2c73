"""`Segment`: sealed rows come back as they were, padding is gone, and attending to it is attending to what it keeps."""

import copy

import pytest
import torch

from hf_kvcache.codecs import DenseCodec, Fp8Codec, PaperTurboQuantCodec, TurboQuantCodec, UniformCodec
from hf_kvcache.kernels.decode_attention import decode_attention
from hf_kvcache.layout import Layout
from hf_kvcache.segment import Segment, counted_places
from hf_kvcache.stores import DeviceStore, HostStore
from hf_kvcache.testing import live_bytes

BATCH, HEADS, TOKENS, DIM = 3, 2, 11, 8
# bytes that an entry costs besides key and value where tokens were dropped
POSITION = 4
STORES = pytest.mark.parametrize("store", [DeviceStore(), HostStore()], ids=lambda store: store.name)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def dense_kv(batch: int = BATCH) -> tuple[torch.Tensor, torch.Tensor]:
    return draw(batch, HEADS, TOKENS, DIM, seed=1), draw(batch, HEADS, TOKENS, DIM, seed=2)


def padding(*lengths: int) -> torch.Tensor:
    """`[B, TOKENS]`, True for the last `lengths[row]` tokens."""
    return torch.arange(TOKENS) >= TOKENS - torch.tensor(lengths)[:, None]


def seal(key, value, valid=None, copies=1, store=DeviceStore()) -> Segment:  # noqa: B008 - a frozen value
    keep = None if valid is None else valid[:, None]
    return Segment.seal(DenseCodec(), store, key, value, keep, copies)


def ragged(lengths: list[list[int]]) -> tuple[Segment, list[list[tuple[torch.Tensor, torch.Tensor]]]]:
    """A segment with its own number of tokens for every row and head, and what is in it."""
    parts = [
        [
            (draw(count, DIM, seed=10 * row + head), draw(count, DIM, seed=100 + 10 * row + head))
            for head, count in enumerate(counts)
        ]
        for row, counts in enumerate(lengths)
    ]
    layout = Layout(tuple(tuple(row) for row in lengths))
    key, value = (
        torch.cat([pair[i] for row in parts for pair in row])[layout.order_on(torch.device("cpu"))] for i in (0, 1)
    )
    held = DeviceStore().put(DenseCodec().encode(key, value))
    rows = tuple(range(len(lengths)))
    return Segment(DenseCodec(), DeviceStore(), held, layout, rows, 0, TOKENS, key.device), parts


def oracle(query, parts, rows, scale=0.3, softcap=0.0):
    """Attention of every batch row and head over its own list of keys, one by one and in float64."""
    out = torch.zeros(*query.shape, dtype=torch.float64)
    lse = torch.full(query.shape[:-1], -torch.inf, dtype=torch.float64)
    for row, stored in enumerate(rows):
        for head in range(query.shape[1]):
            key, value = (tensor.double() for tensor in parts[stored][head])
            if len(key):
                scores = query[row, head].double() @ key.T * scale
                scores = softcap * torch.tanh(scores / softcap) if softcap else scores
                out[row, head], lse[row, head] = scores.softmax(-1) @ value, scores.logsumexp(-1)
    return out, lse


def assert_attends(segment, parts, softcap=0.0):
    query = draw(len(segment.rows), HEADS, 3, DIM, seed=5)
    exact = oracle(query, parts, segment.rows, softcap=softcap)
    for actual, expected in zip(segment.attend(query, 0.3, softcap), exact, strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-6)

    # joined with another partial result it is attention over the keys of both
    extra = draw(len(segment.rows), HEADS, 2, DIM, seed=6)
    beside = decode_attention(query, extra, extra, scale=0.3, softcap=softcap)
    both = [
        [tuple(torch.cat([tensor, extra[row, head]]) for tensor in parts[stored][head]) for head in range(HEADS)]
        for row, stored in enumerate(segment.rows)
    ]
    exact = oracle(query, both, range(len(both)), softcap=softcap)
    for actual, expected in zip(segment.attend(query, 0.3, softcap, beside), exact, strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-6)


# sealing


@STORES
def test_sealed_rows_come_back(store):
    key, value = dense_kv()
    segment = seal(key, value, store=store)
    assert segment.lengths == ((TOKENS,) * HEADS,) * BATCH
    assert segment.rows == (0, 1, 2) and segment.seen == TOKENS
    for row, heads in enumerate(segment.dense()):
        for head, (kept_key, kept_value) in enumerate(heads):
            assert torch.equal(kept_key, key[row, head]) and torch.equal(kept_value, value[row, head])


@STORES
@pytest.mark.parametrize("lengths", [(11, 4, 1), (3, 11, 11), (5, 5, 5)], ids=str)
def test_padding_is_left_out(store, lengths):
    key, value = dense_kv()
    segment = seal(key, value, padding(*lengths), store=store)
    assert segment.lengths == tuple((length,) * HEADS for length in lengths)
    assert segment.seen == TOKENS
    assert live_bytes(segment.held) == sum(lengths) * HEADS * (2 * DIM * 4 + POSITION)
    parts = segment.dense()
    for row, length in enumerate(lengths):
        assert all(torch.equal(parts[row][head][0], key[row, head, TOKENS - length :]) for head in range(HEADS))
    assert_attends(segment, parts)


def test_holes_in_the_mask_are_left_out():
    key, value = dense_kv()
    valid = draw(BATCH, TOKENS) > 0
    segment = seal(key, value, valid)
    for row, heads in enumerate(segment.dense()):
        assert torch.equal(heads[1][1], value[row, 1, valid[row]])


def test_a_row_of_padding_only_attends_to_nothing():
    key, value = dense_kv()
    segment = seal(key, value, padding(11, 0, 4))
    out, lse = segment.attend(draw(BATCH, HEADS, 3, DIM), 0.3, 0.0)
    assert not out[1].any() and bool((lse[1] == -torch.inf).all())
    assert_attends(segment, segment.dense())


@pytest.mark.parametrize("valid", [None, padding(11, 11, 11, 7, 7, 7)], ids=["equal", "padded"])
def test_copies_of_a_prompt_are_kept_once(valid):
    key, value = (tensor[:2].repeat_interleave(3, 0) for tensor in dense_kv())
    segment = seal(key, value, valid, copies=3)
    assert segment.rows == (0, 0, 0, 1, 1, 1) and len(segment.lengths) == 2
    assert live_bytes(segment.held) <= 2 * HEADS * TOKENS * (2 * DIM * 4 + POSITION)
    assert_attends(segment, segment.dense())


def test_copies_must_divide_the_batch():
    with pytest.raises(ValueError, match="2 copies of each prompt, but has 3 rows"):
        seal(*dense_kv(), copies=2)


def test_a_segment_does_not_keep_the_prefill_alive():
    """Neither a view of a longer buffer nor one of more rows."""
    key, value = dense_kv()
    segment = seal(key[:, :, :4], value[:, :, :4])
    assert live_bytes(segment.held) == 2 * BATCH * HEADS * 4 * DIM * 4
    segment = seal(key[:1], value[:1])
    assert live_bytes(segment.held) == 2 * HEADS * TOKENS * DIM * 4


def test_a_segment_does_not_change_with_its_inputs():
    """Keys and values of a forward are not written to again, but a tail is."""
    buffer_key, buffer_value = dense_kv()
    segment = seal(buffer_key[:, :, :9], buffer_value[:, :, :9])
    before = [[tuple(t.clone() for t in pair) for pair in row] for row in segment.dense()]
    buffer_key.zero_()
    buffer_value.zero_()
    for row, kept in zip(segment.dense(), before, strict=True):
        assert all(
            torch.equal(a, b) for pair, old in zip(row, kept, strict=True) for a, b in zip(pair, old, strict=True)
        )


def test_a_segment_has_no_gradient():
    key, value = (tensor.requires_grad_(True) for tensor in dense_kv())
    assert not any(tensor.requires_grad for tensor in seal(key, value).held.values())


# joining


CODECS = pytest.mark.parametrize(
    "codec",
    [
        DenseCodec(),
        TurboQuantCodec(),
        TurboQuantCodec(key_bits=3, value_bits=2),
        PaperTurboQuantCodec(key_bits=2.5, value_bits=2.5),
        UniformCodec(group_size=8),
        UniformCodec(key_axis="token", group_size=8),
        Fp8Codec(),
    ],
    ids=repr,
)


def parts_of_one(codec, store, gaps: bool = False) -> list[Segment]:
    """Three segments of one sequence, of equally long runs; in the first, with gaps, tokens were dropped."""
    segments: list[Segment] = []
    for start, tokens in ((0, 11), (11, 8), (19, 5)):
        key, value = (draw(2, HEADS, tokens, 32, seed=seed + start) for seed in (1, 2))
        keep = None
        if gaps and start == 0:
            # every head keeps six, each its own
            keep = draw(2, HEADS, tokens, seed=3).argsort(-1).argsort(-1) < 6
        like = segments[0] if segments else None
        carried = {"score": draw(2, HEADS, tokens, seed=4 + start)}
        segments.append(Segment.seal(codec, store, key, value, keep, start=start, carried=carried, like=like))
    return segments


@STORES
@CODECS
@pytest.mark.parametrize("gaps", [False, True], ids=["whole", "gaps"])
def test_equally_long_runs_are_joined_without_an_index(monkeypatch, codec, store, gaps):
    """And what comes of it is what the index gives."""
    segments = parts_of_one(codec, store, gaps)
    # which the general way needs, as when entries are dropped
    everything = torch.ones(sum(segment.layout.entries for segment in segments), dtype=torch.bool)
    expected = Segment.join(segments, everything)
    with monkeypatch.context() as patched:
        for index in ("owners_on", "order_on") if gaps else ("owners_on", "order_on", "ranks_on"):
            patched.setattr(Layout, index, lambda *arguments: pytest.fail("an index was built"))
        joined = Segment.join(segments)
    assert joined.lengths == expected.lengths and joined.layout.uniform
    assert (joined.start, joined.seen, joined.rows) == (expected.start, expected.seen, expected.rows)
    assert joined.held.keys() == expected.held.keys() - (set() if gaps else {"positions"})
    for name, tensor in joined.held.items():
        assert tensor.dtype == expected.held[name].dtype and torch.equal(tensor, expected.held[name]), name
    for one, other in zip(joined.padded(), expected.padded(), strict=True):
        assert torch.equal(one, other)


# attending


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize(
    "lengths",
    [
        [[5, 5], [5, 5]],
        [[5, 5], [3, 3]],
        [[5, 2], [3, 3]],
        [[1, 9], [0, 4]],
        [[0, 0], [2, 7]],
        [[4, 4]],
        [[300, 45], [17, 1100]],
        [[64, 32], [16, 128]],
        [[1, 2000]],
    ],
    ids=str,
)
def test_heads_may_keep_different_numbers_of_tokens(lengths, softcap):
    segment, parts = ragged(lengths)
    assert_attends(segment, parts, softcap)


@pytest.mark.parametrize("rows", [[0, 0, 1, 1], [1, 0], [1, 1, 1], [0], [1, 0, 0, 1, 0]], ids=str)
@pytest.mark.parametrize("lengths", [[[5, 5], [5, 5]], [[5, 2], [3, 3]], [[0, 0], [2, 7]]], ids=str)
def test_batch_rows_may_read_any_stored_row(rows, lengths):
    segment, parts = ragged(lengths)
    selected = segment.select_rows(rows)
    assert selected.rows == tuple(rows)
    assert selected.held is segment.held
    assert_attends(selected, parts)


def test_indices_grow_as_the_rows_do():
    """Of a batch of many rows they would otherwise weigh more than what they point at."""
    sizes = []
    for rows in (8, 64):
        segment, _ = ragged([[40 + row % 7, 90 - row % 5] for row in range(rows)])
        segment.attend(draw(rows, 2, 3, DIM), 0.3, 0.0, (torch.zeros(rows, 2, 3, DIM), torch.zeros(rows, 2, 3)))
        sizes.append(sum(tensor.nbytes for tensor in segment.layout.tensors()))
    assert sizes[1] < 9 * sizes[0]


def test_selections_compose():
    segment, parts = ragged([[5, 2], [3, 3], [1, 4]])
    twice = segment.select_rows([2, 0, 0, 1]).select_rows([3, 0, 1])
    assert twice.rows == (1, 2, 0)
    assert segment.rows == (0, 1, 2)
    assert_attends(twice, parts)


@STORES
def test_copied_segments_share_their_tensors(store):
    segment = seal(*dense_kv(), store=store)
    assert copy.deepcopy(segment) is segment


# cropping


@STORES
@pytest.mark.parametrize("tokens", [1, 4, 10])
@pytest.mark.parametrize("lengths", [None, (11, 4, 1)], ids=["full", "padded"])
def test_crop_forgets_the_last_tokens(store, tokens, lengths):
    key, value = dense_kv()
    segment = seal(key, value, None if lengths is None else padding(*lengths), store=store)
    cropped = segment.crop(tokens)
    assert cropped.seen == TOKENS - tokens
    assert cropped.lengths == tuple((max(count[0] - tokens, 0),) * HEADS for count in segment.lengths)
    for row, heads in enumerate(segment.dense()):
        for head, (old_key, old_value) in enumerate(heads):
            rest = cropped.lengths[row][head]
            new_key, new_value = cropped.dense()[row][head]
            assert torch.equal(new_key, old_key[:rest]) and torch.equal(new_value, old_value[:rest])
    entry = 2 * DIM * 4 + POSITION * ("positions" in cropped.held)
    assert live_bytes(cropped.held) == sum(map(sum, cropped.lengths)) * entry
    assert segment.seen == TOKENS
    assert_attends(cropped, cropped.dense())


@pytest.mark.parametrize("tokens", [TOKENS, TOKENS + 5])
def test_crop_of_everything_leaves_no_segment(tokens):
    assert seal(*dense_kv()).crop(tokens) is None


def test_crop_keeps_the_row_map():
    segment = seal(*dense_kv()).select_rows([2, 2, 0])
    cropped = segment.crop(3)
    assert cropped.rows == (2, 2, 0)
    assert_attends(cropped, cropped.dense())


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_places_are_found_without_asking_how_many_there_are(share):
    mask = torch.rand(500, generator=torch.Generator().manual_seed(0)) < share
    assert torch.equal(counted_places(mask, int(mask.sum())), mask.nonzero()[:, 0])
