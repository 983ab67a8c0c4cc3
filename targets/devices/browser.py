"""Runtimes in a browser's page: wllama (llama.cpp) and transformers.js (onnxruntime-web) in headless Chromium.

Worker (worker.py) -> node/browser.mjs, which drives Chromium -> pages/*.mjs, which run the model. Everything comes
from one server on 127.0.0.1. A request to any other server is refused and recorded, and once the model is loaded the
page is offline.
"""
from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from lrc_edge.errors import UserError
from lrc_edge.targets.devices.kits import Kit, missing
from lrc_edge.targets.devices.web_kits import CHROMIUM, PLAYWRIGHT, TRANSFORMERS_JS, WLLAMA
from lrc_edge.targets.runtimes.worker import Command
from lrc_edge.targets.serve.server import PAGES, Mounts, StaticServer

NODE = Path(__file__).parent / "node"

KITS: dict[str, tuple[Kit, ...]] = {"wllama": (WLLAMA, PLAYWRIGHT, CHROMIUM),
                                    "transformers.js": (TRANSFORMERS_JS, PLAYWRIGHT, CHROMIUM)}
MODULES = {"wllama": "/page/wllama.mjs", "transformers.js": "/page/transformers_js.mjs"}


@contextmanager
def command(runtime: str, folder: Path) -> Iterator[Command]:
    """Yield the command for the worker of `runtime`, a key of KITS, while a server gives it the files in `folder`.

    `open` must get the resolved path of a file below the folder: a .gguf, or an onnx/*.onnx of a transformers.js
    folder. A worker opens one file, because its page is offline afterwards. Raises UserError if a kit is missing.
    """
    if why := missing(KITS[runtime]):
        raise UserError(f"{runtime}: {why}; run lrc-edge targets setup {runtime}")
    folder = folder.resolve()
    mounts: Mounts = {"/page": PAGES, "/files/model": folder, "/wllama": WLLAMA.module("@wllama/wllama"),
                      "/transformers": TRANSFORMERS_JS.module("@huggingface/transformers"),
                      "/onnxruntime": TRANSFORMERS_JS.module("onnxruntime-web")}
    # Playwright's and Chromium's temporary folders: the worker is killed, and would leave them. Chromium ends a moment
    # later than the worker.
    with StaticServer(mounts) as server, TemporaryDirectory(prefix="lrc-edge-", ignore_cleanup_errors=True) as scratch:
        settings = {"playwright": str(PLAYWRIGHT.module("playwright-core")), "chromium": str(CHROMIUM.program),
                    "origin": server.origin, "page": MODULES[runtime], "folder": str(folder)}
        yield Command((str(shutil.which("node")), str(NODE / "browser.mjs"), json.dumps(settings)),
                      {"TMPDIR": scratch})
