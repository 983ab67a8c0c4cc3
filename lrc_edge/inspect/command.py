"""`lrc-edge inspect`: describe a Hugging Face directory, a GGUF or ONNX file, or a build."""
from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lrc_edge.errors import UserError
from lrc_edge.figures import NONE, figure, human_bytes, visible
from lrc_edge.inspect.files import describe_build, describe_checkpoint, describe_gguf
from lrc_edge.inspect.onnx_files import describe_onnx

LONG_VALUE = 160  # characters shown of a metadata value; chat templates are much longer
KINDS = {"huggingface": "Hugging Face checkpoint", "gguf": "GGUF", "onnx": "ONNX", "build": "build"}


def describe(path: Path) -> dict[str, Any]:
    """Return what is at `path`; its `kind` is "huggingface", "gguf", "onnx" or "build". Raises UserError."""
    wanted = "pass a Hugging Face directory, a .gguf or .onnx file, or the --out directory of a build"
    if not path.exists():
        raise UserError(f"{path}: no such file or directory; {wanted}")
    if path.is_dir():
        if (path / "config.json").exists():
            return describe_checkpoint(path)
        if (path / "build.json").exists() or (path / "report.json").exists():
            return describe_build(path)
        models = sorted(f.name for f in path.iterdir() if f.suffix in (".gguf", ".onnx"))
        hint = f"it contains {', '.join(models[:3])}: pass one of them" if models else wanted
        raise UserError(f"{path}: no config.json and no build.json in this directory; {hint}")
    if path.suffix == ".onnx":
        return describe_onnx(path)
    with path.open("rb") as file:
        is_gguf = file.read(4) == b"GGUF"  # the stores of Ollama and the hub name files by their hash
    if is_gguf or path.suffix == ".gguf":
        return describe_gguf(path)
    raise UserError(f"{path}: unknown kind of file; {wanted}")


def print_description(path: Path, console: Console, *, tensors: bool = False) -> None:
    """Print `describe(path)`, and with `tensors` every tensor. Without a terminal: plain text, no lines cut."""
    found = describe(path)
    console.print(Text(visible(found["name"]), "bold"), Text(KINDS[found["kind"]], "dim"), soft_wrap=True)
    printers = {"huggingface": _print_checkpoint, "gguf": _print_gguf, "onnx": _print_onnx, "build": _print_build}
    printers[found["kind"]](found, console)
    if tensors and found.get("tensors"):
        _print_table(console, "tensors", ("tensor", "type", "shape", "bytes"), (
            (t["name"], t["dtype"], " × ".join(map(str, t["shape"])), f"{t['bytes']:,}") for t in found["tensors"]))


def _print_checkpoint(found: dict[str, Any], console: Console) -> None:
    tokenizer = found["tokenizer"]
    facts = [("path", found["path"]), ("family", found["family"])]
    facts += [(key, value) for key, value in (found["shape"] or {}).items() if key != "family"]
    facts += [*(_size_facts(found) if found["tensors"] else []),
              ("tokenizer", f"{tokenizer['type']}, {tokenizer['size']:,} tokens" if tokenizer else "none"),
              ("chat template", "yes" if found["chat_template"] else "no"), 
              ("licence", found["license"] or "not stated")]
    if found["onnx_files"]:
        facts.append(("ONNX files", ", ".join(found["onnx_files"])))
    _print_facts(console, facts)
    if found["provenance"]:
        _print_facts(console, found["provenance"].items(), "provenance")
    _print_types(console, found)
    if found["problem"]:
        console.print(Text(f"\nlrc-edge cannot use it: {visible(found['problem'])}", "yellow"), soft_wrap=True)


def _print_gguf(found: dict[str, Any], console: Console) -> None:
    _print_facts(console, [("path", found["path"]), *_size_facts(found)])
    _print_types(console, found)
    _print_facts(console, found["metadata"].items(), "metadata")


def _print_onnx(found: dict[str, Any], console: Console) -> None:
    opsets = ", ".join(f"{domain} {version}" for domain, version in found["opsets"].items())
    _print_facts(console, [("path", found["path"]), ("data files", ", ".join(found["data_files"]) or "none"),
                           ("made by", found["producer"] or NONE), ("opsets", opsets), *_size_facts(found)])
    for name in ("inputs", "outputs"):
        _print_table(console, name, ("name", "type", "shape"), (
            (v["name"], v["dtype"], " × ".join(map(str, v["shape"]))) for v in found[name]))
    _print_table(console, "operators", ("operator", "nodes"), ((op, f"{n:,}") for op, n in found["ops"].items()))
    _print_types(console, found)
    if found["metadata"]:
        _print_facts(console, found["metadata"].items(), "metadata")


def _print_build(found: dict[str, Any], console: Console) -> None:
    _print_facts(console, [("path", found["path"]), ("made from", found["source"] or NONE),
                           ("finished stages", ", ".join(found["stages"]) or "none")])
    report = found["report"]
    if report is None:
        console.print("\nno report.json yet: the build has not finished", soft_wrap=True)
        return
    from lrc_edge.report.report_file import REPORT, damage_reported, verdict

    with damage_reported(Path(found["path"]) / REPORT, "run lrc-edge check to write it again"):
        line = verdict(report)
        rows = [(a["path"], human_bytes(a["bytes"]), figure(a["bits_per_weight"]), a["sha256"][:12])
                for a in report["artifacts"]]
    _print_table(console, "artifacts", ("artifact", "size", "bits per weight", "sha256"), rows)
    console.print(Text(f"\n{line}", "bold"), soft_wrap=True)


def _size_facts(found: dict[str, Any]) -> list[tuple[str, str]]:
    n_params, bits = found["n_params"], found["bits_per_weight"]
    return [("parameters", f"{n_params:,}" if n_params else NONE),
            ("size", f"{human_bytes(found['bytes'])} ({found['bytes']:,} bytes)"),
            ("bits per weight", f"{bits:.3f}" if bits else NONE)]


def _print_types(console: Console, found: dict[str, Any]) -> None:
    types: dict[str, list[int]] = {}
    for t in found["tensors"]:
        row = types.setdefault(t["dtype"], [0, 0, 0])
        for i, n in enumerate((1, math.prod(t["shape"]), t["bytes"])):
            row[i] += n
    largest_first = sorted(types.items(), key=lambda item: -item[1][2])
    if types:
        _print_table(console, "tensor types", ("type", "tensors", "elements", "bytes"), (
            (dtype, *(f"{n:,}" for n in row)) for dtype, row in largest_first))


def _print_facts(console: Console, facts: Iterable[tuple[str, Any]], title: str = "") -> None:
    table = Table.grid(padding=(0, 2))
    for key, value in facts:
        text = f"{value:.7g}" if isinstance(value, float) else visible(value)
        if title and len(text) > LONG_VALUE:
            text = f"{text[:LONG_VALUE]}… ({len(text):,} characters)"
        table.add_row(Text(visible(key), "dim"), Text(text, overflow="fold"))
    _print(console, table, title)


def _print_table(console: Console, title: str, columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> None:
    """Print a table with names in the first column and right-aligned figures."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for i, name in enumerate(columns):
        is_figure = name in ("tensors", "elements", "bytes", "nodes", "size", "bits per weight")
        table.add_column(name, justify="right" if is_figure else "left", overflow="fold", no_wrap=i == 0 and is_figure)
    for row in rows:
        table.add_row(*(Text(visible(cell)) for cell in row))
    _print(console, table, title)


def _print(console: Console, table: Table, title: str) -> None:
    if title:
        console.print(Text(f"\n{title}", "bold"))
    if console.is_terminal:
        console.print(table)
        return
    # A file or a pipe has no width: one line per row, without padding at the end.
    table.width = console.measure(table, options=console.options.update(max_width=100_000)).maximum
    with console.capture() as capture:
        console.print(table, crop=False)
    lines = (line.rstrip() for line in capture.get().splitlines())
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
