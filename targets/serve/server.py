"""A small static HTTP server: some files and folders of this machine at chosen URLs, and nothing else.

For pages that run a model: Cross-Origin-Opener-Policy and Cross-Origin-Embedder-Policy isolate them. Without these
headers, browsers provide no SharedArrayBuffer and so no threads.

The server answers only requests for its own names. A page elsewhere could let its own name resolve to this machine (DNS
rebinding) and read what is served here; the browser would then send that name as the host. The port is not compared,
because a tunnel may change it.
"""
from __future__ import annotations

import errno
import re
import shutil
import socket
import threading
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from ipaddress import ip_address
from pathlib import Path
from types import TracebackType
from typing import BinaryIO
from urllib.parse import unquote, urlsplit

from lrc_edge.errors import UserError

PAGES = Path(__file__).parent / "pages"
Mounts = Mapping[str, Path | bytes]  # URL path -> a file, its content, or a folder ("/page" shows what is below it)

# By our own table: the system's may call WebAssembly application/octet-stream, which browsers refuse to stream.
TYPES = {".html": "text/html; charset=utf-8", ".css": "text/css; charset=utf-8",
         ".js": "text/javascript; charset=utf-8", ".mjs": "text/javascript; charset=utf-8",
         ".json": "application/json", ".wasm": "application/wasm"}
ISOLATION = {"Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp",
             "Cross-Origin-Resource-Policy": "same-origin"}
LOOPBACK = frozenset(("localhost", "127.0.0.1", "[::1]"))


class StaticServer:
    """Serves in its own thread while the context lasts. port 0: any free port.

    headers: sent with every answer. Raises UserError if it cannot listen on the address.
    """

    def __init__(self, mounts: Mounts, host: str = "127.0.0.1", port: int = 0,
                 headers: Mapping[str, str] = ISOLATION):
        handler = type("Handler", (_Handler,), {"mounts": mounts, "headers_sent": headers,
                                                "is_own_name": staticmethod(own_names(host))})
        try:
            self._server = ThreadingHTTPServer((host, port), handler)
        except OSError as error:
            taken = "; give another --port" if error.errno == errno.EADDRINUSE else ""
            raise UserError(f"{host}:{port}: cannot listen there ({error.strerror}){taken}") from error
        self._server.daemon_threads = True
        self.port: int = self._server.server_address[1]
        self.origin = f"http://{host}:{self.port}"

    def __enter__(self) -> StaticServer:
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()

    def wait(self) -> None:
        """Wait until Ctrl-C."""
        try:
            self._thread.join()
        except KeyboardInterrupt:
            pass


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    mounts: Mounts
    headers_sent: Mapping[str, str]
    is_own_name: Callable[[str], bool]

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def _answer(self, with_body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        refusal = self._refusal()
        found = find(self.mounts, path) if refusal is None else None
        if refusal is not None:
            status, sentence = refusal
            self._head(status, "text/plain; charset=utf-8", len(sentence))
            if with_body:
                self.wfile.write(sentence)
        elif found is None:
            self._head(HTTPStatus.NOT_FOUND, "text/plain", 0)
        else:
            self._send(*found, path, with_body)

    def _send(self, content: BinaryIO, size: int, path: str, with_body: bool) -> None:
        with content:
            suffix = Path(path).suffix if path != "/" else ".html"
            self._head(HTTPStatus.OK, TYPES.get(suffix, "application/octet-stream"), size)
            if with_body:
                try:
                    shutil.copyfileobj(content, self.wfile, 1 << 20)
                except (BrokenPipeError, ConnectionResetError):  # the page was closed
                    self.close_connection = True

    def _refusal(self) -> tuple[HTTPStatus, bytes] | None:
        """Return status and message for a request to another name or from another server's page; else None."""
        hosts = self.headers.get_all("Host", [])
        name = re.fullmatch(r"(\[[\da-f:.]+\]|[\w.-]+)(:\d+)?", hosts[0].strip().lower()) if len(hosts) == 1 else None
        if name is None or not self.is_own_name(name[1]):
            return HTTPStatus.MISDIRECTED_REQUEST, b"This server answers to the addresses of its machine only.\n"
        if any(origin.lower() != f"http://{name[0]}" for origin in self.headers.get_all("Origin", [])):
            return HTTPStatus.FORBIDDEN, b"This server answers to its own pages only.\n"
        return None

    def _head(self, status: HTTPStatus, kind: str, size: int) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(size), "Cache-Control": "no-cache",
                            "X-Content-Type-Options": "nosniff", **self.headers_sent}.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing: the command owns the terminal."""


def own_names(host: str) -> Callable[[str], bool]:
    """Whether a name (lower case, without port) refers to a server that listens on `host`.

    If the server is open to other machines, its host name counts too, and any IP address, which needs no DNS.
    """
    names = LOOPBACK | {host.lower()}
    if host.lower() in LOOPBACK:
        return names.__contains__
    machine = socket.gethostname().lower()
    names |= {machine, machine.partition(".")[0] + ".local"}
    return lambda name: name in names or _is_address(name)


def _is_address(name: str) -> bool:
    try:
        ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


def find(mounts: Mounts, path: str) -> tuple[BinaryIO, int] | None:
    """Return the content at the URL path and its size; None if there is none, or if `..` leads out of a folder."""
    parts = path.split("/")[1:]
    if not path.startswith("/") or ".." in parts or "\0" in path or "\\" in path:
        return None
    for n in range(len(parts), -1, -1):  # the longest URL first
        mounted = mounts.get("/" + "/".join(parts[:n]))
        if isinstance(mounted, bytes):
            return (BytesIO(mounted), len(mounted)) if n == len(parts) else None
        if mounted is not None:
            file = mounted.joinpath(*parts[n:])
            return (file.open("rb"), file.stat().st_size) if file.is_file() else None
    return None
