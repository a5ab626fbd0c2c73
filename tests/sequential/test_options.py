"""Options of a store's driver: they get to it from the command line and `patch_model`; what is none is refused."""

import sys

import pytest

from hf_kvcache import METHODS, patch_model
from hf_kvcache.cli import main
from hf_kvcache.sequential import store as stores
from hf_kvcache.sequential.backends.backend import open_backend
from hf_kvcache.sequential.store import PrefixStore
from hf_kvcache.testing import tiny_model


@pytest.fixture
def opened(monkeypatch, tmp_path):
    """(url, options) of the places that are opened, which are folders in truth."""
    found = []

    def note(url, secret, options):
        found.append((url, options))
        return open_backend(tmp_path / url.rpartition("/")[2])

    monkeypatch.setattr(stores, "open_backend", note)
    return found


def run(monkeypatch, capsys, *arguments):
    """Exit code and errors of the command line."""
    monkeypatch.setattr(sys, "argv", ["hf-kvcache", "store", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code or 0, capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("endpoint_url=http://host:9000", "endpoint_url", "http://host:9000"),
        ("endpoint_url=http://host/?a=b", "endpoint_url", "http://host/?a=b"),
        ("profile=work", "profile", "work"),
        ("anon=true", "anon", True),
        ("max_concurrency=4", "max_concurrency", 4),
        ('key="1234"', "key", "1234"),
        ("key=", "key", ""),
        ('client_kwargs={"region_name": "eu"}', "client_kwargs", {"region_name": "eu"}),
    ],
)
def test_values_are_json_or_text(text, name, value, opened, monkeypatch, capsys):
    assert run(monkeypatch, capsys, "stat", "s3://bucket/one", "--option", text)[0] == 0
    assert opened == [("s3://bucket/one", {name: value})]


@pytest.mark.parametrize("command", ["ls", "stat", "verify", "gc"])
def test_every_command_takes_any_number(command, opened, monkeypatch, capsys):
    options = ("--option", "profile=work", "--option", "anon=false")
    assert run(monkeypatch, capsys, command, "s3://bucket/one", *options)[0] == 0
    assert run(monkeypatch, capsys, command, "s3://bucket/one")[0] == 0
    assert opened == [("s3://bucket/one", {"profile": "work", "anon": False}), ("s3://bucket/one", {})]


def test_an_export_has_two_sides(opened, monkeypatch, capsys):
    sides = ("s3://bucket/one", "gs://bucket/two")
    assert run(monkeypatch, capsys, "export", *sides, "--option", "profile=a", "--target-option", "token=b")[0] == 0
    assert sorted(opened) == sorted(zip(sides, ({"profile": "a"}, {"token": "b"}), strict=True))


def test_what_is_no_option_is_named(monkeypatch, capsys, tmp_path):
    for text in ("profile", "=work", ""):
        code, error = run(monkeypatch, capsys, "export", "s3://bucket/one", "two", "--option", text)
        assert code == 2 and f"an option is NAME=VALUE, got {text!r}; for example" in error
    (tmp_path / "pages").mkdir()
    code, error = run(monkeypatch, capsys, "stat", str(tmp_path), "--option", "profile=work")
    assert code == 2 and "a folder takes the option durable, got profile" in error
    assert not PrefixStore(tmp_path, options={"durable": False}).backend.durable


def test_a_redis_refuses_options_before_the_first_prompt():
    pytest.importorskip("redis", reason="redis is not installed")
    with pytest.raises(ValueError, match=r"host:6379/0 cannot be opened with these options: .*profile"):
        PrefixStore("redis://user:password@host:6379/0", options={"profile": "work"})
    PrefixStore("redis://host:6379/0", options={"socket_timeout": 3}).close()


def test_a_model_takes_them_too(opened, tmp_path):
    given = {"profile": "work", "secret": "s3cr3t"}
    model = patch_model(tiny_model("llama"), "sequential", store="s3://bucket/one", store_options=given)
    assert opened == [("s3://bucket/one", given)]
    with pytest.raises(TypeError, match=r"must be a mapping such as .*got a str"):
        patch_model(model, "sequential", store="s3://bucket/one", store_options="profile=work")
    with PrefixStore(tmp_path / "own") as store, pytest.raises(ValueError, match=r"PrefixStore\(url, options="):
        patch_model(model, "sequential", store=store, store_options={"profile": "work"})
    # what is printed or logged holds no passwords
    assert "s3cr3t" not in repr(METHODS["sequential"](store="s3://b/f", store_options=given))
