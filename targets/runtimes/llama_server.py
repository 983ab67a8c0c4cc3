"""llama-server, if this machine has one: render a conversation with its own Jinja."""
from __future__ import annotations

import json
import os
import shutil
import socket
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any

from lrc_edge.targets.runtimes.worker import Command, Worker, WorkerFailed

START_SECONDS, ANSWER_SECONDS = 120.0, 60.0


def server_program() -> Path | None:
    """Return $LLAMA_SERVER, or the llama-server on PATH."""
    found = shutil.which(os.environ.get("LLAMA_SERVER", "llama-server"))
    return Path(found) if found else None


class LlamaServer:
    """A server with one GGUF on a free port of 127.0.0.1. Use it as a context manager. Raises WorkerFailed."""

    def __init__(self, program: Path, file: Path):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._origin = f"http://127.0.0.1:{port}"
        # It reads no requests from stdin. As a Worker it is killed with this process, and its last output is kept.
        self._process = Worker(Command((
            str(program), "--model", str(file), "--host", "127.0.0.1", "--port", str(port), "--ctx-size", "512",
            "--threads", "1", "--no-warmup", "--jinja")))

    def __enter__(self) -> LlamaServer:
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                self._ask("/health")
                return self
            except WorkerFailed:
                if not self._process.is_alive or time.monotonic() > deadline:
                    self._process.close()
                    raise
                time.sleep(0.1)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._process.close()

    def render_chat(self, messages: list[dict[str, str]]) -> tuple[str, list[int]]:
        """Return the rendered prompt and its ids."""
        prompt = self._ask("/apply-template", {"messages": messages})["prompt"]
        ids = self._ask("/tokenize", {"content": prompt, "add_special": True, "parse_special": True})["tokens"]
        return prompt, ids

    def _ask(self, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._origin + path, data, {"Content-Type": "application/json"})
        try:
            # Not through the proxy of the environment.
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            with opener.open(request, timeout=ANSWER_SECONDS) as answer:
                return json.loads(answer.read())
        except (OSError, ValueError) as error:
            detail = error.read()[:200].decode(errors="replace") if isinstance(error, urllib.error.HTTPError) else ""
            raise WorkerFailed(f"llama-server, {path}: {error} {' '.join(detail.split())}".strip()) from error
