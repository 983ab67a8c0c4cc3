"""`lrc-edge serve`: a page in which a GGUF answers in the browser, by wllama. Needs no PyTorch.

Everything comes from this server, and the page's Content-Security-Policy lets it ask nobody else.
"""
from __future__ import annotations

import json
from pathlib import Path

from lrc_edge.artifact import smallest_gguf
from lrc_edge.errors import UserError
from lrc_edge.targets.devices.web_kits import WLLAMA
from lrc_edge.targets.serve.server import ISOLATION, PAGES, Mounts, StaticServer

# wllama starts its worker and loads its program through blob: URLs.
POLICY = {"Content-Security-Policy": "default-src 'none'; script-src 'self' 'wasm-unsafe-eval' blob:; "
                                     "worker-src blob:; connect-src 'self' blob:; style-src 'self'; img-src data:; "
                                     "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"}


def page_server(path: Path, encoding: str, host: str, port: int) -> StaticServer:
    """The page of a GGUF file, or of one of a build directory: the smallest, or the smallest in `encoding`.

    Raises UserError when there is none, wllama is not installed, or it cannot listen there.
    """
    file = smallest_gguf(path, encoding)
    if why := WLLAMA.missing():
        raise UserError(f"{why}; run lrc-edge targets setup wllama")
    about = {"file": file.name, "name": file.stem, "bytes": file.stat().st_size}
    wllama = WLLAMA.module("@wllama/wllama")
    mounts: Mounts = {"/": PAGES / "chat.html", "/about.json": json.dumps(about).encode(), "/model.gguf": file,
                      **{f"/{name}": PAGES / name for name in ("chat.css", "chat.mjs", "gguf.mjs", "llama.mjs")},
                      "/wllama": wllama, "/wllama-compat": WLLAMA.module("@wllama/wllama-compat")}
    return StaticServer(mounts, host, port, {**ISOLATION, **POLICY})
