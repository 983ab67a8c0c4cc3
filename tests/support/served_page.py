"""The page of `lrc-edge serve`, used as a person uses it. As a script: the screenshots of the documentation.

    python tests/served_page.py BUILD
"""
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from paths import NODE, ROOT

from lrc_edge.targets.devices.web_kits import CHROMIUM, PLAYWRIGHT
from lrc_edge.targets.serve.command import page_server

IMAGES = ROOT / "docs" / "images"
PHONE = {"width": 375, "height": 812}


def use(model: Path, host: str = "127.0.0.1", **asked: Any) -> dict[str, Any]:
    """What tests/node/page.mjs found when it did what is asked. `host`: of the address that is opened; another name
    than 127.0.0.1 needs a server for other devices."""
    with page_server(model, "", "127.0.0.1" if host == "127.0.0.1" else "0.0.0.0", 0) as server:
        told = {"playwright": str(PLAYWRIGHT.module("playwright-core")), "chromium": str(CHROMIUM.program),
                "host": host, "url": f"http://{host}:{server.port}/", **asked}
        done = subprocess.run(["node", str(NODE / "page.mjs")], input=json.dumps(told),
                              capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def make_screenshots(build: Path) -> None:
    story: dict[str, Any] = {"asks": ["Tell me a story about a dog and a ball."],
                             "settings": {"temperature": 0, "length": 110}}
    IMAGES.mkdir(parents=True, exist_ok=True)
    use(build, screenshot=str(IMAGES / "serve-desktop.png"), **story)
    use(build, screenshot=str(IMAGES / "serve-phone.png"), scale=2, **PHONE, **story)


if __name__ == "__main__":
    make_screenshots(Path(sys.argv[1]))
