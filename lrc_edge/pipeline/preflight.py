"""What can be known before hours of work: widths, formats, tokenizer, data, disk. Nothing here writes."""
from __future__ import annotations

import difflib
from pathlib import Path

from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.corpus.sources import SELF, WANTED, looks_local
from lrc_edge.errors import UserError
from lrc_edge.families import weights_of
from lrc_edge.figures import human_bytes
from lrc_edge.recipe import Recipe
from lrc_edge.shape import ModelShape, student_width
from lrc_edge.targets.fit import check_fit
from lrc_edge.targets.profile import load_profile, load_profiles
from lrc_edge.targets.runtimes.table import is_here
from lrc_edge.workspace import free_bytes

# Name -> elements of a block, which a row must be a multiple of.
ONNX_ENCODINGS = {"fp32": 1, "fp16": 1, "q8": 32, "q4": 32}


def gguf_encodings() -> dict[str, int]:
    """GGUF encoding -> elements of its block (1, 32 or 256)."""
    from lrc_edge.export.quantize.encodings import ENCODINGS

    return {name: encoding.block for name, encoding in ENCODINGS.items()}


def parse_format(text: str) -> tuple[str, str]:
    """`gguf:q4_k_m` -> ("gguf", "q4_k_m"). Raises UserError with the nearest known name."""
    format_, _, encoding = text.lower().partition(":")
    known = [f"onnx:{name}" for name in ONNX_ENCODINGS] + [f"gguf:{name}" for name in gguf_encodings()]
    if f"{format_}:{encoding}" not in known:
        near = difflib.get_close_matches(text.lower(), known, n=1, cutoff=0.0)[0]
        raise UserError(f"format {text!r} is unknown; did you mean {near}? Known: {', '.join(known)}")
    return format_, encoding


def _check_imatrix(recipe: Recipe, formats: list[tuple[str, str]]) -> None:
    from lrc_edge.export.quantize.encodings import ENCODINGS, check_imatrix

    for format_, encoding in formats:
        if format_ == "gguf":
            check_imatrix(ENCODINGS[encoding], recipe.export.calibration_tokens > 0)


def wanted_formats(recipe: Recipe, hidden_size: int) -> list[tuple[str, str]]:
    """The recipe's formats and its targets', or the default ones of a model of this width."""
    named = [*recipe.export.formats, *(name for profile in load_profiles(recipe.export.targets)
                                       for name in profile.format_names)]
    default = ["gguf:f16", "gguf:q8_0", "onnx:fp32"]
    default += ["gguf:q4_k_m", "gguf:q4_0", "onnx:q4"] * (hidden_size % 256 == 0)
    return [parse_format(text) for text in dict.fromkeys(named or default)]


GRID_FORMATS = {("gguf", "q4_0"), ("onnx", "q4")}  # what training on the Q4_0 grid is for


def trains_on_grid(recipe: Recipe, hidden_size: int) -> bool:
    return recipe.quantize.tokens > 0 and not GRID_FORMATS.isdisjoint(wanted_formats(recipe, hidden_size))


def _check_quantize(recipe: Recipe, shape: ModelShape, formats: list[tuple[str, str]], has_teacher: bool) -> None:
    """Whether quantization-aware training is possible where it is asked for."""
    q = recipe.quantize
    if not q.tokens:
        return
    from lrc_edge.train.loop.quantized_stage import row_off_the_grid

    if GRID_FORMATS.isdisjoint(formats):
        raise UserError(f"quantize.tokens = {q.tokens}: trains the student on the grid of gguf:q4_0 and onnx:q4, and "
                        "neither is among the formats; add one, or set quantize.tokens=0")
    if row := row_off_the_grid(shape):
        raise UserError(f"quantize.tokens = {q.tokens}: a row of {row} does not divide into the Q4_0 grid's blocks of "
                        "32; set quantize.tokens=0")
    if q.teacher == "teacher" and not has_teacher:
        raise UserError("quantize.teacher = 'teacher': an export has none; leave it at 'student'")
    if not recipe.data.sources:
        raise UserError(f"quantize.tokens = {q.tokens}: no text to train on; {WANTED} with --data")


def student_name(recipe: Recipe, teacher: DenseCheckpoint) -> str:
    return recipe.student.name or f"{teacher.name}-LRC-{student_width(recipe, teacher.shape)}"


def check_build(teacher: DenseCheckpoint, recipe: Recipe, out: Path, runtimes: bool = True) -> None:
    """Everything that would stop a build later. Raises UserError.

    `runtimes` is off on a machine that only trains and has none: formats are then judged where they are written.
    """
    from lrc_edge.train.loop.trainer import choose_device

    _check_name(recipe)
    choose_device(recipe.train.device)
    _check_sources(recipe)
    formats = wanted_formats(recipe, student_width(recipe, teacher.shape)) if runtimes else []
    _check_width(teacher, recipe, formats)
    if runtimes:
        _check_quantize(recipe, teacher.shape.with_hidden_size(student_width(recipe, teacher.shape)), formats, True)
    _check_runtimes(teacher, recipe, formats)
    if runtimes:
        _check_mixed_precision(recipe, teacher.shape.with_hidden_size(student_width(recipe, teacher.shape)))
    _check_disk(out, _build_bytes(teacher.shape, recipe, formats))


def fit_warnings(teacher: DenseCheckpoint, recipe: Recipe) -> list[str]:
    """A line for each of the recipe's targets that the student will not fit."""
    student = teacher.shape.with_hidden_size(student_width(recipe, teacher.shape))
    plans = (check_fit(student, load_profile(name)) for name in recipe.export.targets)
    return [plan.warning for plan in plans if plan.warning]


def check_export(student: DenseCheckpoint, recipe: Recipe, out: Path) -> None:
    """The same for an export. Widths of a finished model are what they are: tensors that do not fit are reported."""
    formats = wanted_formats(recipe, student.shape.hidden_size)
    _check_quantize(recipe, student.shape, formats, False)
    _check_runtimes(student, recipe, formats)
    _check_mixed_precision(recipe, student.shape)
    _check_disk(out, _export_bytes(student.shape, recipe, formats))


def _check_width(teacher: DenseCheckpoint, recipe: Recipe, formats: list[tuple[str, str]]) -> None:
    width, where = student_width(recipe, teacher.shape), "student.hidden_size"
    if width >= teacher.shape.hidden_size:
        raise UserError(f"{where} = {width}: the teacher {teacher.name} is {teacher.shape.hidden_size} wide; "
                        "need a smaller student")
    encodings = {"gguf": gguf_encodings() if formats else {}, "onnx": ONNX_ENCODINGS}
    for format_, encoding in formats:
        block = encodings[format_][encoding]
        if width % block:
            remain = [f"{f}:{name}" for f, table in encodings.items() for name, b in table.items() if width % b == 0]
            raise UserError(f"{where} = {width}: {format_}:{encoding} stores rows in blocks of {block}, which do not "
                            f"divide it; take a multiple of {block}, or of the formats that remain: "
                            f"{', '.join(remain)}")


def _check_name(recipe: Recipe) -> None:
    name = recipe.student.name
    if any(c in name for c in "/\\\0\n") or name.startswith("."):
        raise UserError(f"student.name = {name!r}: it names files; need one without / and \\ and no dot in front")


def _check_sources(recipe: Recipe) -> None:
    if not recipe.data.sources:
        raise UserError(f"no data: the student learns from text; {WANTED} with --data, or --data self")
    for source in recipe.data.sources:
        if source != SELF and looks_local(source) and not Path(source).expanduser().exists():
            raise UserError(f"--data {source}: no such file or folder; {WANTED}")


def _check_runtimes(model: DenseCheckpoint, recipe: Recipe, formats: list[tuple[str, str]]) -> None:
    """Whether the runtimes of the wanted formats can say what this model, or a student of it, says."""
    model.check_config()
    rows = len(model.tokenizer())
    if rows > model.shape.vocab_size:
        raise UserError(f"{model.path}: the tokenizer has {rows} tokens, the embedding {model.shape.vocab_size} rows; "
                        "get a tokenizer and weights that belong together")
    kinds = {format_ for format_, _ in formats} | ({"gguf"} if formats and recipe.export.bits_per_weight else set())
    if "gguf" in kinds:
        _check_imatrix(recipe, formats)
        from lrc_edge.export.gguf.to_gguf import check_gguf

        check_gguf(model)
    if "onnx" in kinds:
        from lrc_edge.export.onnx.graph import check_supported

        check_supported(model)


def _check_mixed_precision(recipe: Recipe, shape: ModelShape) -> None:
    """Whether a file of that size can be made of a model of this shape."""
    if recipe.export.bits_per_weight:
        from lrc_edge.export.quantize.mixed_precision import check_size

        check_size(weights_of(shape), recipe.export.bits_per_weight)


# Bytes a weight of the encodings, near enough to reserve disk.
_BYTES = {"f32": 4.0, "fp32": 4.0, "f16": 2.0, "fp16": 2.0, "bf16": 2.0, "q8_0": 1.1, "q8": 1.2}
_OTHER_BYTES = 0.9


def _export_bytes(shape: ModelShape, recipe: Recipe, formats: list[tuple[str, str]]) -> float:
    """Artifacts, the lossless file that llama.cpp quantizes from, and training on the grid."""
    kept = sum(_BYTES.get(encoding, _OTHER_BYTES) for _, encoding in formats) + recipe.export.bits_per_weight / 8
    on_grid = _training_bytes(recipe, 4 * shape.n_params) + 4.0 * shape.n_params if recipe.quantize.tokens else 0.0
    return shape.n_params * (kept + 4.0) + on_grid


def _training_bytes(recipe: Recipe, trained: float) -> float:
    """Checkpoints with both Adam moments, one more while it is being written, and the result."""
    return (3 * (recipe.train.keep_checkpoints + 1) + 1) * trained


def _build_bytes(teacher: ModelShape, recipe: Recipe, formats: list[tuple[str, str]]) -> float:
    width = student_width(recipe, teacher)
    student = teacher.with_hidden_size(width)
    projections = 4 * teacher.hidden_size * width * (7 * teacher.num_hidden_layers + 2)
    trained = max(projections, 4 * student.n_params) if recipe.train.dense_share else projections
    identity = 4 * teacher.n_params  # the teacher folded through P = I; gone before training
    tokens = recipe.train.tokens * (2 if teacher.vocab_size <= 2**16 else 4)
    training = _training_bytes(recipe, trained) + 4 * student.n_params
    # In 4 bits, where a target is a machine like this one: its speed is what the student's is compared with.
    timed = 0.6 * teacher.n_params if any(is_here(load_profile(name)) for name in recipe.export.targets) else 0
    return tokens + max(identity, training + _export_bytes(student, recipe, formats) + timed)


def _check_disk(out: Path, needed: float) -> None:
    """`needed`: bytes of the finished build, of which an earlier run may have written some."""
    needed -= sum(file.lstat().st_size for file in out.rglob("*") if file.is_file())
    free = free_bytes(out.resolve())
    if free < needed:
        raise UserError(f"{out}: needs about {human_bytes(needed)}, {human_bytes(free)} are free; "
                        "free some space or give an --out on another disk")
