"""The anchors: a few shapes between a teacher and its smallest students, timed in a real runtime."""
from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from lrc_edge.formats import Kind, format_of
from lrc_edge.shape import ModelShape
from lrc_edge.targets import speed
from lrc_edge.targets.runtimes.table import Start
from lrc_edge.targets.timing.cost import Timing

UNIT = 64  # widths and neurons are multiples of it, so that every format's blocks fit
# Shares of the teacher's width, layers, neurons, query heads and key/value heads: each part of the cost is large in one
# of them and small in another.
SHARES = ((1 / 2, 1 / 2, 1, 1, 1), (1 / 2, 1, 1 / 2, 1 / 2, 1 / 2), (1, 1 / 4, 1, 1, 1), (1 / 4, 1 / 2, 1, 1, 1),
          (3 / 4, 1 / 4, 1 / 2, 1, 1 / 2), (1 / 4, 1, 1 / 4, 1 / 2, 1), (1 / 2, 1 / 4, 1 / 2, 1 / 4, 1 / 4))


def anchors_of(teacher: ModelShape) -> list[ModelShape]:
    """Return the shapes to time for students of this teacher."""
    def part(size: int, share: float, unit: int = UNIT) -> int:
        return max(1, round(size * share / unit)) * unit

    found = []
    for width, layers, neurons, query, key in SHARES:
        n_kv = part(teacher.num_key_value_heads, key, 1)
        per_group = max(1, round(teacher.num_attention_heads * query / n_kv))
        found.append(teacher.resized({
            "hidden_size": part(teacher.hidden_size, width), "num_hidden_layers": part(
                teacher.num_hidden_layers, layers, 1),
            "intermediate_size": part(teacher.intermediate_size, neurons), "num_attention_heads": n_kv * per_group,
            "num_key_value_heads": n_kv}))
    return list(dict.fromkeys(found))


def _write_gguf(shape: ModelShape, format_: str, path: Path) -> None:
    from lrc_edge.targets.timing.random_gguf import write_random_gguf

    write_random_gguf(shape, format_, path)


def _write_onnx(shape: ModelShape, format_: str, path: Path) -> None:
    from lrc_edge.targets.timing.random_onnx import write_random_onnx

    write_random_onnx(shape, format_, path)


# Kind -> the package that writes its files, and the function that imports it: a device may have only one of them.
WRITERS: dict[Kind, tuple[str, Callable[[ModelShape, str, Path], None]]] = {
    "gguf": ("gguf", _write_gguf), "onnx": ("onnx", _write_onnx)}


def time_shapes(shapes: list[ModelShape], format_: str, start: Start, context: int, threads: int,
                progress: Callable[[str], None], folder: Path | None = None) -> list[Timing]:
    """Time files of these shapes with random weights, at an empty cache and deep in the context.

    folder: for temporary files, all shapes at once. Raises WorkerFailed.
    """
    row = format_of(format_)
    _, write = WRITERS[row.kind]
    with tempfile.TemporaryDirectory(dir=folder) as name:
        files: dict[str, tuple[Start, Path]] = {}
        for i, shape in enumerate(shapes):
            progress(f"writing shape {i + 1} of {len(shapes)}")
            path = Path(name) / str(i) / row.file.format(model="random")
            path.parent.mkdir(parents=True)
            write(shape, format_, path)
            files[str(i)] = start, path
        n_ctx = min(context, *(shape.max_position_embeddings for shape in shapes))
        prompt = [i % min(shape.vocab_size for shape in shapes) for i in range(n_ctx)]
        rates = speed.measure(files, prompt, n_ctx, threads, progress)
    return [Timing(shape, format_, row["depth"] + speed.N_PROMPT, row["prompt"], row["decode"])
            for i, shape in enumerate(shapes) for row in rates[str(i)]]
