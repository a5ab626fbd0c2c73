"""`RedisServer`: pages as values of a Redis server, for many machines that share one memory.

    hf_kvcache:page:<key>        the bytes of a page
    hf_kvcache:entry:<key>       what is known of it, a hash; `hits` and `used` among it
    hf_kvcache:after:<parent>    the ids of the pages behind it, a sorted set
    hf_kvcache:all               all keys, a set
    hf_kvcache:pins              names and the keys that they hold on to, a hash
    hf_kvcache:bytes             of all pages, a number

One page is one transaction, which keeps the sum of the bytes too. What the server drops by itself (`maxmemory`) is
taken off that sum when the store is collected, and what else is there of the page is removed.

In a sorted set whose scores are all equal, members lie in the order of their bytes. So of all pages behind a parent,
the one that shares most with a prompt lies right before or right behind the place that the prompt itself would have.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np

from hf_kvcache.sequential.backends.backend import Collected, Entry, blob_of_ids, ids_of_blob
from hf_kvcache.sequential.identity import page_key, require_key

PREFIX = "hf_kvcache"
# scripts that are sent to the server in one go
AT_ONCE = 1000
# before an entry is changed or removed: KEYS are the entry and the sum, ARGV the bytes that the page will have
RESIZE = """
local old = redis.call('HGET', KEYS[1], 'size') or 0
return redis.call('INCRBY', KEYS[2], ARGV[1] - old)
"""
# before an entry is removed: KEYS are the entry and what is behind its parent
FORGET = """
local ids = redis.call('HGET', KEYS[1], 'ids')
if ids then redis.call('ZREM', KEYS[2], ids) end
"""
# KEYS is the entry, ARGV the time; of a page that has gone nothing is to be left
COUNT = """
if redis.call('HEXISTS', KEYS[1], 'known') == 0 then return 0 end
redis.call('HINCRBY', KEYS[1], 'hits', 1)
return redis.call('HSET', KEYS[1], 'used', ARGV[1])
"""
# KEYS are the page, the entry and all keys, ARGV the key and what the names of pages behind a parent begin with;
# returns the bytes of a page that is removed because its entry has gone
MEND = """
local there, bytes = redis.call('HEXISTS', KEYS[2], 'known'), redis.call('STRLEN', KEYS[1])
if there == 1 and bytes > 0 then
    redis.call('SADD', KEYS[3], ARGV[1])
    return 0
end
local parent, ids = unpack(redis.call('HMGET', KEYS[2], 'parent', 'ids'))
if parent and ids then redis.call('ZREM', ARGV[2] .. parent, ids) end
redis.call('DEL', KEYS[1], KEYS[2])
redis.call('SREM', KEYS[3], ARGV[1])
return bytes
"""
# KEYS are what is behind a parent and a page there, ARGV the ids of the page
PRUNE = """
if redis.call('EXISTS', KEYS[2]) == 0 then redis.call('ZREM', KEYS[1], ARGV[1]) end
"""
# KEYS are all keys and the sum, ARGV what the names of entries begin with
RECOUNT = """
local total = 0
for _, key in ipairs(redis.call('SMEMBERS', KEYS[1])) do
    total = total + (redis.call('HGET', ARGV[1] .. key, 'size') or 0)
end
redis.call('SET', KEYS[2], total)
return total
"""


class RedisServer:
    """Pages in Redis.

    Args:
        url: `redis://host:port/database`.
        secret: with which pages are signed; checked by the store.
        options: for `redis.Redis.from_url`.
    """

    def __init__(self, url: str, secret: bytes = b"", options: Mapping[str, Any] | None = None) -> None:
        try:
            import redis
        except ImportError:
            raise ModuleNotFoundError(f"the store {url.split('@')[-1]} needs redis; pip install redis") from None
        self._client: Any = redis.Redis.from_url(
            url, **{"socket_timeout": 20, "socket_connect_timeout": 5, **(options or {})}
        )
        try:
            # an option that is none would be found out by the first prompt; this connects to nothing
            self._client.connection_pool.connection_class(**self._client.connection_pool.connection_kwargs)
        except TypeError as error:
            raise ValueError(f"the store {url.split('@')[-1]} cannot be opened with these options: {error}") from None
        self._failures: tuple[type[Exception], ...] = (redis.RedisError, OSError)

    @property
    def failures(self) -> tuple[type[Exception], ...]:
        return self._failures

    def write(self, entry: Entry, data: bytes) -> None:
        key = require_key(entry.key)
        known = {
            "parent": require_key(entry.parent),
            "ids": blob_of_ids(entry.ids),
            "size": len(data),
            "hits": entry.hits,
            "used": entry.used,
            "known": json.dumps(
                [entry.start, entry.codec, entry.created, entry.seconds, entry.information, entry.model]
            ),
        }
        with self._client.pipeline(transaction=True) as transaction:
            transaction.eval(RESIZE, 2, f"{PREFIX}:entry:{key}", f"{PREFIX}:bytes", len(data))
            transaction.set(f"{PREFIX}:page:{key}", data)
            transaction.hset(f"{PREFIX}:entry:{key}", mapping=known)
            transaction.zadd(f"{PREFIX}:after:{entry.parent}", {blob_of_ids(entry.ids): 0})
            transaction.sadd(f"{PREFIX}:all", key)
            transaction.execute()

    def read(self, key: str, parent: str) -> bytes | None:
        return self._client.get(f"{PREFIX}:page:{require_key(key)}")

    def contains(self, key: str, parent: str) -> bool:
        return bool(self._client.exists(f"{PREFIX}:page:{require_key(key)}"))

    def nearest(self, parent: str, ids: np.ndarray) -> list[np.ndarray]:
        name, place = f"{PREFIX}:after:{require_key(parent)}", b"[" + blob_of_ids(ids)
        with self._client.pipeline(transaction=False) as pipeline:
            pipeline.zrevrangebylex(name, place, "-", 0, 1)
            pipeline.zrangebylex(name, place, "+", 0, 1)
            found = [ids_of_blob(blob) for blobs in pipeline.execute() for blob in blobs]
        return [own for own in found if own is not None]

    def used(self, keys: Iterable[tuple[str, str]]) -> None:
        with self._client.pipeline(transaction=False) as pipeline:
            for key, _ in keys:
                pipeline.eval(COUNT, 1, f"{PREFIX}:entry:{key}", time.time())
            pipeline.execute()

    def delete(self, key: str, parent: str) -> None:
        with self._client.pipeline(transaction=True) as transaction:
            transaction.eval(RESIZE, 2, f"{PREFIX}:entry:{require_key(key)}", f"{PREFIX}:bytes", 0)
            transaction.eval(FORGET, 2, f"{PREFIX}:entry:{key}", f"{PREFIX}:after:{require_key(parent)}")
            transaction.delete(f"{PREFIX}:page:{key}", f"{PREFIX}:entry:{key}")
            transaction.srem(f"{PREFIX}:all", key)
            transaction.execute()

    def entries(self) -> Iterator[Entry]:
        for key in self._client.sscan_iter(f"{PREFIX}:all"):
            found = self._client.hgetall(f"{PREFIX}:entry:{key.decode()}")
            ids = ids_of_blob(found.get(b"ids"))
            if b"known" not in found or ids is None:
                continue
            start, codec, created, seconds, information, model = json.loads(found[b"known"])
            yield Entry(
                key.decode(),
                found[b"parent"].decode(),
                ids,
                *(start, codec, int(found[b"size"]), created, float(found[b"used"]), int(found[b"hits"])),
                *(seconds, information, model),
            )

    def total(self) -> int:
        known = self._client.get(f"{PREFIX}:bytes")
        return self._recount() if known is None else int(known)

    def pins(self) -> dict[str, str]:
        return {name.decode(): key.decode() for name, key in self._client.hgetall(f"{PREFIX}:pins").items()}

    def pin(self, name: str, key: str | None) -> None:
        if key is None:
            self._client.hdel(f"{PREFIX}:pins", name)
        else:
            self._client.hset(f"{PREFIX}:pins", name, require_key(key))

    def collect(self) -> Collected:
        """A transaction leaves nothing behind; but the server may have dropped pages, or what is known of them."""
        keys = {key.decode() for key in self._client.sscan_iter(f"{PREFIX}:all")}
        for kind in ("page", "entry"):
            # also where the set of all keys was dropped
            keys |= {name.decode().rpartition(":")[2] for name in self._client.scan_iter(f"{PREFIX}:{kind}:*", 1000)}
        after = f"{PREFIX}:after:"
        freed = self._each(
            (MEND, 3, f"{PREFIX}:page:{key}", f"{PREFIX}:entry:{key}", f"{PREFIX}:all", key, after) for key in keys
        )
        self._recount()
        return Collected(sum(freed))

    def reindex(self, entries: Sequence[Entry]) -> None:
        """Enters again what the server has dropped by itself, and removes what leads to pages that have gone."""
        with self._client.pipeline(transaction=False) as pipeline:
            for entry in entries:
                pipeline.zadd(f"{PREFIX}:after:{entry.parent}", {blob_of_ids(entry.ids): 0})
            pipeline.execute()
        for name in self._client.scan_iter(f"{PREFIX}:after:*", 1000):
            parent = name.decode().rpartition(":")[2]
            members = (blob for blob, _ in self._client.zscan_iter(name, count=1000))
            known = ((blob, ids_of_blob(blob)) for blob in members)
            self._each(
                (PRUNE, 2, name, f"{PREFIX}:page:{'' if ids is None else page_key(parent, ids)}", blob)
                for blob, ids in known
            )

    def _each(self, scripts: Iterable[tuple[Any, ...]]) -> list[Any]:
        """What scripts return, each with its keys and arguments; so many are sent at once."""
        results, waiting = [], iter(scripts)
        while some := list(islice(waiting, AT_ONCE)):
            with self._client.pipeline(transaction=False) as pipeline:
                for script in some:
                    pipeline.eval(*script)
                results += pipeline.execute()
        return results

    def _recount(self) -> int:
        """Adds up the bytes of all pages anew."""
        return int(self._client.eval(RECOUNT, 2, f"{PREFIX}:all", f"{PREFIX}:bytes", f"{PREFIX}:entry:"))

    def close(self) -> None:
        self._client.close()
