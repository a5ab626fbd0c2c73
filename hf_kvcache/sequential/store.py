"""`PrefixStore`: pages of prefixes on a trie, shared by sessions, processes and machines."""

from __future__ import annotations

import hashlib
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from hf_kvcache.sequential import eviction, record
from hf_kvcache.sequential.backends import Backend, Collected, Entry, open_backend
from hf_kvcache.sequential.identity import Identity, page_key
from hf_kvcache.sequential.limit import Limit, removable, remove
from hf_kvcache.sequential.lookup import Match, extend
from hf_kvcache.sequential.packing import PageError, UnreadablePage
from hf_kvcache.sequential.page import Context, Page, PageCodec
from hf_kvcache.sequential.prefill import PrefillRates
from hf_kvcache.sequential.writer import Writer

PAGE_SIZE = 256


@dataclass
class Counts:
    """What a store has done in this process."""

    adopted_pages: int = 0
    adopted_tokens: int = 0
    written_pages: int = 0
    written_bytes: int = 0
    known_pages: int = 0
    dropped_pages: int = 0
    damaged_pages: int = 0
    unreadable_pages: int = 0
    failures: int = 0
    read_bytes: int = 0
    read_seconds: float = 0.0
    decoding_seconds: float = 0.0


class PrefixStore:
    """Pages of keys and values by the tokens that they stand for. Reuse is exact: identical prefixes only.

    Every page is a node of a trie: its key is the hash of the page before it, of its token ids and of everything else
    that its numbers depend on (`Identity`). Sessions that begin alike share their pages; where they part, the page in
    question is written again for the new branch (copy on write) and nothing that exists is changed.

    A store never makes a run fail: a page that is damaged, missing or cannot be written is a miss, the prompt is
    computed, and the first failure of each kind is said once as a warning.

    Args:
        url: a folder, or any URL of fsspec (`s3://bucket/folder`) or Redis (`redis://host:6379/0`).
        page_size: tokens of a page.
        limit_bytes: keep the store below this; None for no limit. Pages that are pinned or of another secret count, and
            are not removed. Of several processes that write at once, each can exceed it by a hundredth.
        namespace: of a tenant. Its prefixes are matched by nobody else's.
        secret: up to 64 bytes; pages are signed with it, and all others are neither found nor read.
        options: for the driver: `durable` of a folder, those of fsspec's file system (`endpoint_url`, `profile`, ...),
            those of `redis.Redis.from_url`.

    Example:
        >>> store = PrefixStore("cache-folder", limit_bytes=10 << 30)
        >>> patch_model(model, "sequential", store=store)
    """

    def __init__(
        self,
        url: str | Path,
        *,
        page_size: int = PAGE_SIZE,
        limit_bytes: int | None = None,
        namespace: str = "",
        secret: bytes = b"",
        options: Mapping[str, Any] | None = None,
    ) -> None:
        if isinstance(page_size, bool) or not isinstance(page_size, int) or not 1 <= page_size <= record.MOST_TOKENS:
            raise ValueError(f"page_size is a number of tokens from 1 to {record.MOST_TOKENS}, got {page_size!r}")
        if limit_bytes is not None and limit_bytes < 1:
            raise ValueError(f"limit_bytes must be positive, or None for no limit, got {limit_bytes!r}")
        if not isinstance(secret, bytes) or len(secret) > 64:
            raise ValueError("secret must be up to 64 bytes")
        self.url, self.page_size, self.limit_bytes = str(url), page_size, limit_bytes
        self.namespace, self.secret, self.options = namespace, secret, dict(options or {})
        self.counts, self.rates = Counts(), PrefillRates()
        self.backend: Backend = open_backend(self.url, secret, self.options)
        self._limit = None if limit_bytes is None else Limit(self.backend, limit_bytes)
        self._said: set[str] = set()
        self._writer = Writer(self._failed)
        # of a store that nobody closes; at exit the system does, after all that waits has been written
        weakref.finalize(self, self.backend.close).atexit = False

    @property
    def tenant(self) -> str:
        """Whose pages these are: the namespace, and the secret by its digest.

        So pages that could not be read are not found either, and do not keep this store from writing its own.
        """
        return f"{self.namespace}\0{hashlib.sha256(self.secret).hexdigest()}" if self.secret else self.namespace

    def match(
        self,
        identity: Identity,
        ids: Sequence[int] | np.ndarray,
        *,
        known: Sequence[Match] = (),
        forked: int | None = None,
    ) -> list[Match]:
        """The longest chain of pages that `ids` begins with; the last one may be shared in part.

        Args:
            identity: of the run.
            ids: the prompt.
            known: whole pages that were found of its beginning before; they are not asked for again.
            forked: tokens of the longest page of which a part counts; None for any.
        """
        found = list(known)
        forked = self.page_size if forked is None else forked
        with self._surviving("looked up"):
            extend(found, self.backend, identity.root, np.asarray(ids, dtype=np.uint32), self.page_size, forked)
        return found

    def holds(self, match: Match) -> bool:
        """Whether a page that was found is still there."""
        there = False
        with self._surviving("looked up"):
            there = self.backend.contains(match.key, match.parent)
        return there

    def load(self, match: Match, codecs: dict[str, PageCodec], context: Context) -> Page | None:
        """A matched page, None when it is not usable; a damaged one is removed."""
        page = None
        with self._surviving("read"):
            began = time.perf_counter()
            data = self.backend.read(match.key, match.parent)
            arrived = time.perf_counter()
            self.counts.read_seconds += arrived - began
            try:
                if data is not None:
                    self.counts.read_bytes += len(data)
                    page = record.read(data, match.key, match.parent, codecs, context, self.secret, self.page_size)
            except UnreadablePage as error:
                self._unreadable(match.key, error)
            except PageError as error:
                self.counts.damaged_pages += 1
                self.backend.delete(match.key, match.parent)
                self._say("damaged", f"dropped the page {match.key[:16]}, it will be computed again: {error}")
            self.counts.decoding_seconds += time.perf_counter() - arrived
        return page

    @property
    def bandwidth(self) -> float:
        """Bytes a second over all pages read so far; 0 when none was."""
        return self.counts.read_bytes / self.counts.read_seconds if self.counts.read_seconds else 0.0

    def adopted(self, matches: Sequence[Match], tokens: int) -> None:
        """Counts pages of which a run has taken over so many tokens, those of all rows together."""
        self.counts.adopted_pages += len(matches)
        self.counts.adopted_tokens += tokens
        self._writer.submit(partial(self._count, [(match.key, match.parent) for match in matches]), 0)

    def put(self, page: Page, parent: str, codec: PageCodec, context: Context, **known: Any) -> str | None:
        """Stores a page unless it is there; returns its key once it is safe, None when it could not be stored.

        Args:
            page: the page.
            parent: key of the page before it, or the root of the identity.
            codec: to code it with.
            context: for the codec.
            known: further fields of the entry: `seconds`, `information`, `model`.
        """
        key, stored = page_key(parent, page.ids), False
        with self._surviving("written"):
            if self.backend.contains(key, parent):
                self.counts.known_pages += 1
                return key
            now = time.time()
            entry = Entry(key, parent, page.ids, page.start, codec.name, 0, now, now, **known)
            written = record.write(page, codec, context, entry, self.secret)
            if self._make_room(written.entry.size, keep=parent):
                self.backend.write(written.entry, written.data)
                self.counts.written_pages += 1
                self.counts.written_bytes += written.entry.size
                stored = True
        return key if stored else None

    def submit(self, task: Callable[[], None], size: int, ahead: Callable[[], None] | None = None) -> None:
        """Runs a task that writes pages of `size` bytes in the background, in order; drops it when too many wait.

        Args:
            task: to run.
            size: bytes that it holds.
            ahead: called at once when the task has to wait.
        """
        if not self._writer.submit(task, size, ahead):
            self.counts.dropped_pages += 1
            self._say("slow", "pages come faster than they can be written; some are not stored")

    def flush(self) -> None:
        """Waits until everything that was submitted is written."""
        self._writer.flush()

    def close(self) -> None:
        """Writes what waits and lets go of the place. Whoever uses the store later opens it again."""
        self._writer.close()
        self.backend.close()

    def __enter__(self) -> PrefixStore:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def entries(self) -> Iterator[Entry]:
        """What is known of every page."""
        return self.backend.entries()

    def annotate(self, identity: Identity, ids: Sequence[int] | np.ndarray, bits: np.ndarray) -> int:
        """Notes I(page) = -log2 P_M(page | what is before it) on the pages of a prompt; returns on how many.

        Args:
            identity: of the run.
            ids: the prompt.
            bits: of every token (`information.token_bits`).
        """
        keys = {match.key: match for match in self.match(identity, ids) if match.length}
        known = [entry for entry in self.backend.entries() if entry.key in keys]
        for entry in known:
            data = self.backend.read(entry.key, entry.parent)
            if data is not None and keys[entry.key].length == len(entry.ids):
                own = float(bits[entry.start : entry.start + len(entry.ids)].sum())
                noted = record.annotated(data, own, self.secret)
                self.backend.write(replace(entry, information=own, size=len(noted)), noted)
        return len(known)

    def export(self, other: PrefixStore) -> int:
        """Copies every whole page to another store; returns how many it did not have."""
        copied = 0
        for entry in self.backend.entries():
            data = self.backend.read(entry.key, entry.parent)
            if data is None or other.backend.contains(entry.key, entry.parent):
                continue
            try:
                record.summary(data, self.secret)
            except UnreadablePage as error:
                self._unreadable(entry.key, error)
                continue
            except PageError:
                continue
            other.backend.write(entry, data)
            copied += 1
        return copied

    def verify(self) -> tuple[int, list[str]]:
        """Reads every page; returns how many are whole and the keys of those that are not, which are removed.

        Pages that are whole and cannot be read here are left, and counted in `counts.unreadable_pages`.
        """
        whole, damaged = 0, list(self._collect().damaged)
        for entry in list(self.backend.entries()):
            data = self.backend.read(entry.key, entry.parent)
            if data is None:
                # somebody else has removed it since: that is no damage
                continue
            try:
                found = record.summary(data, self.secret)
                good = found.key == entry.key == page_key(entry.parent, found.ids)
            except UnreadablePage as error:
                self._unreadable(entry.key, error)
                continue
            except PageError:
                good = False
            whole += good
            if not good:
                damaged.append(entry.key)
                self.backend.delete(entry.key, entry.parent)
        return whole, damaged

    def gc(self, limit_bytes: int | None = None) -> int:
        """Removes what interrupted writes left, pages that nothing leads to, tails that a longer page has made needless
        and, above a limit, what is worth least. Returns the bytes freed.

        Args:
            limit_bytes: to come as near to as pins allow. None for the limit of the store, for which nothing is removed
                where that would not be enough.
        """
        found = self._collect()
        entries, pinned = list(self.backend.entries()), set(self.backend.pins().values())
        # what stands behind a page that nobody here can read is not lost
        gone = [] if found.unreadable else list(eviction.needless(entries, pinned, self.page_size))
        for entry in gone:
            self.backend.delete(entry.key, entry.parent)
        if limit_bytes is not None:
            gone += remove(self.backend, removable(self.backend), self.backend.total() - limit_bytes)
        elif self._limit is not None:
            gone += self._limit.free()
        keys = {entry.key for entry in gone}
        self.backend.reindex([entry for entry in entries if entry.key not in keys])
        return found.freed + sum(entry.size for entry in gone)

    def pin(self, name: str, key: str | None) -> None:
        """Makes a name hold on to a page and all before it, so that no limit removes them; None lets go."""
        self.backend.pin(name, key)

    def __reduce__(self):
        options = {"page_size": self.page_size, "limit_bytes": self.limit_bytes, "namespace": self.namespace}
        return _reopen, (self.url, {**options, "secret": self.secret, "options": self.options})

    def __deepcopy__(self, memo) -> PrefixStore:
        return self

    def _make_room(self, size: int, keep: str) -> bool:
        """Keeps the store below its limit with `size` more bytes; False when that cannot be."""
        problem = "" if self._limit is None else self._limit.make_room(size, {keep})
        if problem:
            self._say("limit", problem)
        return not problem

    def _collect(self) -> Collected:
        """Has the place clean up, and counts what is there and cannot be read here."""
        found = self.backend.collect()
        for key, error in found.unreadable:
            self._unreadable(key, error)
        return found

    def _unreadable(self, key: str, error: UnreadablePage) -> None:
        """Counts a page that is left as it is."""
        self.counts.unreadable_pages += 1
        self._say("unreadable", f"cannot read the page {key[:16]} and others like it, which are kept: {error}")

    @contextmanager
    def _surviving(self, verb: str) -> Iterator[None]:
        """Turns failures of the place into a warning, said once."""
        try:
            yield
        except self.backend.failures as error:
            self.counts.failures += 1
            self._say(verb, f"pages cannot be {verb} ({type(error).__name__}: {error}); generation goes on without")

    def _count(self, keys: list[tuple[str, str]]) -> None:
        with self._surviving("counted"):
            self.backend.used(keys)

    def _failed(self, error: BaseException) -> None:
        self.counts.failures += 1
        self._say("coded", f"a page was not stored ({type(error).__name__}: {error})")

    def _say(self, what: str, text: str) -> None:
        if what not in self._said:
            self._said.add(what)
            warnings.warn(f"prefix store {_without_password(self.url)}: {text}", RuntimeWarning, stacklevel=2)


def _reopen(url: str, options: dict[str, Any]) -> PrefixStore:
    """For pickles of patched models: a store is its place, not its connections."""
    return PrefixStore(url, **options)


def _without_password(url: str) -> str:
    scheme, separator, rest = url.partition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}" if separator else url
