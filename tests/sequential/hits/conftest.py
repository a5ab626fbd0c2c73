"""The store that the tests of hits read and write."""

import warnings

import pytest

from hf_kvcache.sequential.store import PrefixStore
from tests.sequential.hits.compositions import PAGE


@pytest.fixture
def store(tmp_path):
    """A store whose failures are errors here."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        with PrefixStore(tmp_path / "store", page_size=PAGE) as opened:
            yield opened
            opened.flush()
            assert opened.counts.failures == opened.counts.damaged_pages == 0
