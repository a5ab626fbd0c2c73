"""`check_laws`: what every method promises, checked on tiny random models; for methods of your own and their tests."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from hf_kvcache.api import compress, is_patched, load_cache, patch_model, unpatch_model
from hf_kvcache.methods import Method
from hf_kvcache.report import report
from hf_kvcache.testing import VOCABULARY, greedy, left_pad, live_bytes, model_state, random_ids, tiny_model

LENGTH, FOLLOWING = 48, 3
ROWS = 2


def check_laws(
    method: str | Method | Sequence[str | Method] | None, families: Sequence[str] = ("llama", "gemma2"), **options: Any
) -> None:
    """Raises when a method breaks one of the laws of the cache on a tiny model.

    Args:
        method, options: as for `patch_model`. Prompts have up to 48 tokens, so choose budgets below that.
        families: of the models; one with sliding windows should be among them.

    Raises:
        AssertionError: that names the law and the family.

    Example:
        >>> check_laws(MyScorer(budget=24))
        >>> check_laws([MyScorer(budget=24), "turboquant"], bits=8)
    """
    for family in families:
        model = tiny_model(family)
        before = model_state(model)
        patch_model(model, method, **options)
        for law in LAWS:
            try:
                law(model)
            except AssertionError as error:
                raise AssertionError(f"on {family}: {law.__doc__} {error}".rstrip()) from error
        unpatch_model(model)
        assert not is_patched(model)
        model_state(model).assert_equal(before)


def _repeats(model: Any) -> None:
    """The same prompt gives the same text."""
    ids = _prompts()
    assert torch.equal(greedy(model, ids), greedy(model, ids))


def _alone(model: Any) -> None:
    """A row of a batch, padded or not, gives the text of that row alone."""
    for shorter in (0, 15):
        rows = [row[:length] for row, length in zip(_prompts(), (LENGTH, LENGTH - shorter))]
        ids, mask = left_pad(rows)
        together = greedy(model, ids, attention_mask=mask)
        for row, own in enumerate(rows):
            assert torch.equal(together[row], greedy(model, own[None])[0]), (
                f"row {row} of {ids.shape[1]} tokens differs"
            )


def _parts(model: Any) -> None:
    """A prompt that is read in parts gives the text of one that is read at once."""
    ids, full = _prompt()
    whole, parts = (greedy(model, full, past_key_values=compress(model, ids, chunk=chunk)) for chunk in (0, 11))
    assert torch.equal(whole, parts)


def _kept(model: Any) -> None:
    """A cache that was copied, or saved and loaded, goes on like the original."""
    ids, full = _prompt()
    cache = compress(model, ids)
    copied = copy.deepcopy(cache)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cache.safetensors"
        cache.save(path)
        loaded = load_cache(model, path)
    expected = greedy(model, full, past_key_values=cache)
    assert torch.equal(greedy(model, full, past_key_values=copied), expected), "the copy differs"
    assert torch.equal(greedy(model, full, past_key_values=loaded), expected), "the loaded one differs"


def _bytes(model: Any) -> None:
    """The bytes that a report names are those that the cache keeps alive, besides what belongs to the method."""
    cache = compress(model, _prompts())
    told, held = report(cache).bytes, live_bytes(cache) - live_bytes(cache.spec)
    assert told == held, f"{told} are reported, {held} are held"


def _prompts() -> torch.Tensor:
    """`[ROWS, LENGTH]`, no token twice in a row: equal tokens can have equal scores, and ties fall either way."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randperm(VOCABULARY - 1, generator=generator)[:LENGTH] + 1 for _ in range(ROWS)]
    return torch.stack(rows)


def _prompt() -> tuple[torch.Tensor, torch.Tensor]:
    """A prompt, and the same with a few tokens more, as `generate` takes it with a cache of the first."""
    ids = _prompts()[:1]
    return ids, torch.cat([ids, random_ids(length=FOLLOWING, seed=9)], dim=1)


LAWS: tuple[Callable[[Any], None], ...] = (_repeats, _alone, _parts, _kept, _bytes)
