"""The static server: what it shows, and what it never does."""
from __future__ import annotations

import http.client
import socket
from collections.abc import Iterator

import pytest

from lrc_edge.errors import UserError
from lrc_edge.targets.serve.server import StaticServer


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StaticServer]:
    tmp_path = tmp_path_factory.mktemp("server")
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


def ask(server: StaticServer, path: str, method: str = "GET", **headers: str
        ) -> tuple[int, str, bytes, http.client.HTTPMessage]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    connection.request(method, path, headers=headers)
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


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "LocalHost", "[::1]"])
@pytest.mark.parametrize("port", ["", ":80", ":{port}"])  # a tunnel may lead here from any port
def test_its_own_names(server: StaticServer, host: str, port: str) -> None:
    host += port.format(port=server.port)
    assert ask(server, "/", Host=host)[:3] == (200, "text/html; charset=utf-8", b"<p>page")
    assert ask(server, "/", Host=host, Origin=f"http://{host}")[0] == 200


@pytest.mark.parametrize("host", [
    "evil.example", "evil.example:{port}", "localhost.evil.example:{port}", "127.0.0.1.evil.example", "127.0.0.1@evil",
    "evil@127.0.0.1", "192.168.0.7:{port}", "[fe80::1]", "0.0.0.0", "2130706433", "", ":{port}", "localhost:", "a b"])
def test_other_names_are_refused(server: StaticServer, host: str) -> None:
    """As a browser sends them whose page's name was pointed at this machine (DNS rebinding)."""
    status, kind, body, _ = ask(server, "/about.json", Host=host.format(port=server.port))
    assert (status, kind) == (421, "text/plain; charset=utf-8") and body.endswith(b" its machine only.\n")
    status, _, body, _ = ask(server, "/about.json", "HEAD", Host=host.format(port=server.port))
    assert (status, body) == (421, b"")


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "https://127.0.0.1:{port}", "http://127.0.0.1:1",
                                    "http://localhost:{port}"])
def test_pages_of_other_servers_are_refused(server: StaticServer, origin: str) -> None:
    host = f"127.0.0.1:{server.port}"
    status, _, body, _ = ask(server, "/about.json", Host=host, Origin=origin.format(port=server.port))
    assert status == 403 and body == b"This server answers to its own pages only.\n"


def test_a_request_without_a_host_or_with_two(server: StaticServer) -> None:
    for hosts in ((), ("localhost", "localhost"), ("localhost", "evil.example")):
        connection = http.client.HTTPConnection("127.0.0.1", server.port)
        connection.putrequest("GET", "/", skip_host=True)
        for host in hosts:
            connection.putheader("Host", host)
        connection.endheaders()
        assert connection.getresponse().status == 421
        connection.close()


def test_a_server_for_other_devices() -> None:
    """Addresses, and the machine's names; a name that someone else could own is refused there, too."""
    with StaticServer({"/": b"page"}, host="0.0.0.0") as server:
        machine = socket.gethostname()
        for host in ("127.0.0.1", "localhost", "192.168.0.7:8080", "[fe80::1]:8080", "0.0.0.0", machine,
                     f"{machine.partition('.')[0]}.local:{server.port}"):
            assert ask(server, "/", Host=host)[0] == 200, host
        for host in ("evil.example", "192.168.0.7.evil.example", "192.168.0.7x", "2130706433"):
            assert ask(server, "/", Host=host)[0] == 421, host


def test_a_port_that_is_taken(server: StaticServer) -> None:
    with pytest.raises(UserError, match=rf"127\.0\.0\.1:{server.port}: cannot listen there.*--port"):
        StaticServer({}, port=server.port)
