"""A small static HTTP server: some files and folders of this machine at chosen URLs, and nothing else.

For pages that run a model: Cross-Origin-Opener-Policy and Cross-Origin-Embedder-Policy isolate them, without which
browsers give no SharedArrayBuffer and so no threads.
"""
from __future__ import annotations

import errno
import shutil
import threading
from collections.abc import Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from types import TracebackType
from typing import BinaryIO
from urllib.parse import unquote, urlsplit

from lrc_edge.errors import UserError

Mounts = Mapping[str, Path | bytes]  # URL path -> a file, its content, or a folder ("/page" shows what is below it)

# By our own table: the system's may call WebAssembly application/octet-stream, which browsers refuse to stream.
TYPES = {".html": "text/html; charset=utf-8", ".css": "text/css; charset=utf-8",
         ".js": "text/javascript; charset=utf-8", ".mjs": "text/javascript; charset=utf-8",
         ".json": "application/json", ".wasm": "application/wasm"}
ISOLATION = {"Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp",
             "Cross-Origin-Resource-Policy": "same-origin"}


class StaticServer:
    """Serves while the context lasts, in a thread of its own. port 0: any that is free.

    headers: sent with every answer. Raises UserError when it cannot listen there.
    """

    def __init__(self, mounts: Mounts, host: str = "127.0.0.1", port: int = 0,
                 headers: Mapping[str, str] = ISOLATION):
        handler = type("Handler", (_Handler,), {"mounts": mounts, "headers_sent": headers})
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
        """Until Ctrl-C."""
        try:
            self._thread.join()
        except KeyboardInterrupt:
            pass


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    mounts: Mounts
    headers_sent: Mapping[str, str]

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def _answer(self, with_body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        found = find(self.mounts, path)
        if found is None:
            self._head(HTTPStatus.NOT_FOUND, "text/plain", 0)
            return
        content, size = found
        with content:
            suffix = Path(path).suffix if path != "/" else ".html"
            self._head(HTTPStatus.OK, TYPES.get(suffix, "application/octet-stream"), size)
            if with_body:
                try:
                    shutil.copyfileobj(content, self.wfile, 1 << 20)
                except (BrokenPipeError, ConnectionResetError):  # the page was closed
                    self.close_connection = True

    def _head(self, status: HTTPStatus, kind: str, size: int) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(size), "Cache-Control": "no-cache",
                            "X-Content-Type-Options": "nosniff", **self.headers_sent}.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the terminal is the command's."""


def find(mounts: Mounts, path: str) -> tuple[BinaryIO, int] | None:
    """What is at the URL path, and its bytes; None where there is nothing, or where `..` leads out of a folder."""
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
