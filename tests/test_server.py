"""The static server: what it shows, and what it never does."""
from __future__ import annotations

import http.client
from collections.abc import Iterator
from pathlib import Path

import pytest

from lrc_edge.errors import UserError
from lrc_edge.targets.server import StaticServer


@pytest.fixture
def server(tmp_path: Path) -> Iterator[StaticServer]:
    folder = tmp_path / "shown"
    (folder / "below").mkdir(parents=True)
    (folder / "page.html").write_text("<p>page")
    (folder / "below/run.mjs").write_text("1")
    (folder / "below/run.wasm").write_bytes(bytes(3_000_000))
    (folder / "with space.json").write_text("{}")
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "shown-too").write_text("secret")
    with StaticServer({"/": folder / "page.html", "/files": folder, "/about.json": b"[1]"}) as running:
        yield running


def ask(server: StaticServer, path: str, method: str = "GET") -> tuple[int, str, bytes, http.client.HTTPMessage]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    connection.request(method, path)
    response = connection.getresponse()
    body = response.read()
    connection.close()
    return response.status, response.headers["Content-Type"], body, response.headers


@pytest.mark.parametrize(("path", "kind", "body"), [
    ("/", "text/html; charset=utf-8", b"<p>page"), ("/files/page.html?x=1", "text/html; charset=utf-8", b"<p>page"),
    ("/files/below/run.mjs", "text/javascript; charset=utf-8", b"1"),
    ("/files/below/run.wasm", "application/wasm", bytes(3_000_000)), ("/about.json", "application/json", b"[1]"),
    ("/files/with%20space.json", "application/json", b"{}")])
def test_files_come_with_their_types(server: StaticServer, path: str, kind: str, body: bytes) -> None:
    assert ask(server, path)[:3] == (200, kind, body)
    status, _, nothing, headers = ask(server, path, "HEAD")
    assert (status, nothing, headers["Content-Length"]) == (200, b"", str(len(body)))


def test_pages_are_isolated(server: StaticServer) -> None:
    headers = ask(server, "/")[3]
    assert headers["Cross-Origin-Opener-Policy"] == "same-origin"
    assert headers["Cross-Origin-Embedder-Policy"] == "require-corp"


@pytest.mark.parametrize("path", [
    "/files/../secret", "/files/%2e%2e/secret", "/files/below/../../secret", "/files/..%2fsecret", "/files/..%5csecret",
    "/files/below", "/files/", "/files", "/files-too", "/shown-too", "/../secret", "//etc/passwd", "/files//etc/passwd",
    "/files/%00", "/about.json/x", "/about", "/files/missing"])
def test_nothing_else_is_shown(server: StaticServer, path: str) -> None:
    status, _, body, _ = ask(server, path)
    assert (status, body) == (404, b"")


def test_a_port_that_is_taken(server: StaticServer) -> None:
    with pytest.raises(UserError, match=rf"127\.0\.0\.1:{server.port}: cannot listen there.*--port"):
        StaticServer({}, port=server.port)
