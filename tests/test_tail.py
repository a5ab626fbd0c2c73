"""`Tail`: what is appended comes back, old tokens are not moved for every new one, and cropping frees the room."""

import pytest
import torch

from hf_kvcache.tail import MIN_GROWTH, Tail


def tokens(count: int, seed: int = 0, batch: int = 2):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, 3, count, 8, generator=generator) for _ in range(2))


def filled(*counts: int) -> tuple[Tail, torch.Tensor, torch.Tensor]:
    tail, parts = Tail(), [tokens(count, seed) for seed, count in enumerate(counts)]
    for part in parts:
        tail.append(*part)
    return tail, *(torch.cat(tensors, dim=2) for tensors in zip(*parts, strict=True))


def test_an_empty_tail_holds_nothing():
    tail = Tail()
    assert tail.length == tail.capacity == 0 and tail.tensors() == []
    tail.select_rows([1, 0])
    tail.crop(0)
    assert tail.tensors() == []


@pytest.mark.parametrize(
    "counts", [(1,), (5,), (1,) * 100, (40, 1, 1, 63, 2), (500, 1)], ids=lambda counts: f"{sum(counts)}"
)
def test_what_is_appended_comes_back(counts):
    tail, key, value = filled(*counts)
    assert tail.length == sum(counts)
    assert torch.equal(tail.key, key) and torch.equal(tail.value, value)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=str)
def test_tokens_of_two_dtypes_lose_nothing(dtypes):
    parts = [tuple(part.to(dtype) for part in tokens(3, seed)) for seed, dtype in enumerate(dtypes)]
    tail = Tail()
    for part in (*parts, parts[1]):
        tail.append(*part)
    for held, given in zip((tail.key, tail.value), zip(*parts, parts[1], strict=True), strict=True):
        assert held.dtype == torch.float32
        assert torch.equal(held, torch.cat([part.float() for part in given], dim=2))


def test_inputs_are_copied():
    key, value = tokens(4)
    tail = Tail()
    tail.append(key, value)
    kept = key.clone()
    key.zero_()
    assert torch.equal(tail.key, kept)


def test_old_tokens_are_moved_a_bounded_number_of_times():
    tail, moved, place = Tail(), 0, None
    for step in range(4000):
        before = tail.length
        tail.append(*tokens(1, step))
        if tail.key.data_ptr() != place:
            moved, place = moved + before, tail.key.data_ptr()
    # growing by an eighth moves a token 1 / (1 - 1 / 1.125) = 9 times at most
    assert moved <= 9 * 4000
    assert tail.capacity <= 1.125 * 4000 + MIN_GROWTH


def test_unused_room_is_bounded():
    for count in (1, 10, 100, 1000):
        tail, _, _ = filled(count)
        assert tail.capacity - count <= max(MIN_GROWTH, count / 8)


def test_reserved_room_is_taken_at_once_and_exactly():
    tail = Tail()
    tail.reserve(70)
    places = set()
    for start in range(0, 70, 7):
        tail.append(*tokens(7, start))
        places.add(tail.key.data_ptr())
    assert len(places) == 1 and tail.capacity == 70
    tail.append(*tokens(1))
    assert tail.length == 71 <= tail.capacity


def test_what_is_cropped_is_written_over():
    tail, key, _ = filled(20, 5)
    place = tail.key.data_ptr()
    tail.crop(8)
    assert tail.length == 17 and torch.equal(tail.key, key[:, :, :17])
    again, _ = tokens(3, seed=9)
    tail.append(again, again)
    assert torch.equal(tail.key, torch.cat([key[:, :, :17], again], dim=2))
    assert tail.key.data_ptr() == place


@pytest.mark.parametrize("rows", [[0, 1], [1, 0], [0, 0], [1], [1, 0, 1, 1]], ids=str)
def test_rows_are_selected(rows):
    tail, key, value = filled(6)
    tail.select_rows(rows)
    assert torch.equal(tail.key, key[rows]) and torch.equal(tail.value, value[rows])
    more = tokens(1, batch=len(rows))
    tail.append(*more)
    assert torch.equal(tail.key, torch.cat([key[rows], more[0]], dim=2))


def test_selected_rows_do_not_share_memory():
    tail, key, _ = filled(6)
    tail.select_rows([0, 0])
    tail.key[0].zero_()
    assert torch.equal(tail.key[1], key[0])


def test_tensors_are_the_whole_buffers():
    tail, _, _ = filled(6)
    held = sum(tensor.nbytes for tensor in tail.tensors())
    assert held == 2 * 2 * 3 * tail.capacity * 8 * 4
    assert held == sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tail.tensors()}.values())


def test_a_window_is_moved_seldom_and_has_little_room():
    tail, key, _ = filled(300)
    moved, place = 0, None
    for step in range(1000):
        more, _ = tokens(1, seed=step)
        tail.append(more, more)
        tail.keep_last(99)
        key = torch.cat([key, more], dim=2)
        assert torch.equal(tail.key, key[:, :, -99:])
        moved, place = moved + (tail.tensors()[0].data_ptr() != place), tail.tensors()[0].data_ptr()
        assert tail.capacity <= 99 + 2 * MIN_GROWTH
    assert moved <= 2 + 1000 // MIN_GROWTH


def test_of_what_was_adopted_only_what_is_needed_stays():
    key, value = tokens(50)
    tail = Tail()
    tail.adopt(key, value)
    tail.keep_last(50)
    assert tail.key.data_ptr() == key.data_ptr()
    tail.keep_last(49)
    assert tail.key.untyped_storage().nbytes() == key[:, :, 1:].nbytes and torch.equal(tail.value, value[:, :, 1:])
    tail.keep_last(0)
    assert tail.length == 0 and tail.capacity <= 2 * MIN_GROWTH + 49


def test_what_was_adopted_is_not_written_to():
    key, value = tokens(5)
    before = key.clone()
    tail = Tail()
    tail.adopt(key, value)
    tail.crop(2)
    tail.append(*tokens(2, seed=1))
    assert torch.equal(key, before) and torch.equal(tail.key[:, :, :3], key[:, :, :3])
