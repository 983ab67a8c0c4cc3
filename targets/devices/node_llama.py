"""llama.cpp in node: the command for the worker (worker.py) of node-llama-cpp."""
from __future__ import annotations

import shutil
from pathlib import Path

from lrc_edge.errors import UserError
from lrc_edge.targets.devices.kits import Kit, missing
from lrc_edge.targets.devices.web_kits import NODE_LLAMA_CPP
from lrc_edge.targets.runtimes.worker import Command

KITS: tuple[Kit, ...] = (NODE_LLAMA_CPP,)


def command() -> Command:
    """Return the command. Raises UserError if the kit is missing."""
    if why := missing(KITS):
        raise UserError(f"node-llama-cpp: {why}; run lrc-edge targets setup node-llama-cpp")
    script = Path(__file__).parent / "node" / "node_llama_cpp.mjs"
    return Command((str(shutil.which("node")), str(script), str(NODE_LLAMA_CPP.folder / "node_modules")))
