"""Write the parts of a Hugging Face directory that a fold and a trimmed teacher share: weights, tokenizer, licences."""
from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lrc_edge.checkpoint import TOKENIZER_PARTS

SHARD_BYTES = 2 * 1024**3
LICENCES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE")


def write_weights(tensors: Iterator[tuple[str, torch.Tensor]], folder: Path) -> None:
    """Write shards of at most SHARD_BYTES, with an index if there are several. One shard is in memory at a time."""
    shards: list[dict[str, Any]] = []
    shard: dict[str, torch.Tensor] = {}
    size = total = 0

    def flush() -> None:
        nonlocal shard, size
        save_file(shard, folder / f"shard-{len(shards)}", metadata={"format": "pt"})
        shards.append(dict.fromkeys(shard))
        shard, size = {}, 0

    for name, tensor in tensors:
        n_bytes = tensor.numel() * tensor.element_size()
        if shard and size + n_bytes > SHARD_BYTES:
            flush()
        shard[name] = tensor
        size, total = size + n_bytes, total + n_bytes
    flush()
    if len(shards) == 1:
        (folder / "shard-0").rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{number}").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2))


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the tokenizer's files. The only change is the class name: one that reads tokenizer.json literally in
    transformers 4 and 5."""
    copy_files(source, folder, TOKENIZER_PARTS)
    config = folder / "tokenizer_config.json"
    if config.exists():
        table = json.loads(config.read_text())
        if (folder / "tokenizer.json").exists():
            table["tokenizer_class"] = "PreTrainedTokenizerFast"
        table.pop("auto_map", None)
        config.write_text(json.dumps(table, indent=2, ensure_ascii=False) + "\n")


def copy_files(source: Path, folder: Path, names: Iterable[str]) -> None:
    """Copy those of the files that exist."""
    for name in names:
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)
