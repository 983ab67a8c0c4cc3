"""config.json of a Hugging Face directory: whether it is there, whether this project can handle it, and its shape."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lrc_edge.errors import UserError
from lrc_edge.roles import FAMILIES, UNSUPPORTED_SWITCHES
from lrc_edge.shape import ModelShape

PROVENANCE_FILE = "lrc_edge.json"  # in the folder of a student that was made here: of whom, and how


def read_config(path: Path) -> dict[str, Any]:
    """The table of path/config.json. Raises UserError."""
    if not path.is_dir():
        raise UserError(f"{path}: not a directory; give a Hugging Face model directory")
    file = path / "config.json"
    if not file.exists():
        raise UserError(f"{path}: no config.json; give a Hugging Face model directory")
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"{file}: not JSON ({error}); get an intact copy") from error
    if not isinstance(config, dict):
        raise UserError(f"{file}: holds a {type(config).__name__}, need a table; get an intact copy")
    return config


def shape_of(config: dict[str, Any], where: Path) -> ModelShape:
    """The shape, of a family that is supported. Raises UserError naming `where`."""
    family = config.get("model_type")
    if family not in FAMILIES:
        raise UserError(f"{where}: model_type {family!r} is not supported; supported: {', '.join(FAMILIES)}")
    for switch in UNSUPPORTED_SWITCHES[family]:
        if config.get(switch):
            raise UserError(f"{where}: {switch} = true is not supported for {family}; only plain {family} models are")
    if config.get("hidden_act", "silu") != "silu":
        raise UserError(f"{where}: hidden_act {config['hidden_act']!r} is not supported; need 'silu'")
    if config.get("quantization_config"):
        raise UserError(f"{where}: the checkpoint is quantized already; give the unquantized model")
    return ModelShape.from_config(config, str(where))
