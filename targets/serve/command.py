"""`lrc-edge serve`: a page to chat with a GGUF in the browser, through wllama. Needs no PyTorch.

Everything comes from this server. The page's Content-Security-Policy forbids requests to any other host.
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
    """Return the server for a GGUF file or for a build directory's smallest GGUF (or smallest in `encoding`).

    Raises UserError if there is no such GGUF, wllama is not installed, or the address is not available.
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
