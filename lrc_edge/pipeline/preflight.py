"""Checks before hours of work: widths, formats, tokenizer, data, disk. Nothing here writes."""
from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.config_file import LONGEST_NAME
from lrc_edge.corpus.sources import SELF, WANTED, looks_local
from lrc_edge.errors import UserError
from lrc_edge.families import weights_of
from lrc_edge.figures import human_bytes
from lrc_edge.formats import FORMATS, KINDS
from lrc_edge.pipeline.plan import Plan
from lrc_edge.recipe import Recipe
from lrc_edge.shape import ModelShape
from lrc_edge.student import nearest, row_lengths, sizes_that_work
from lrc_edge.targets.fit import check_fit
from lrc_edge.targets.runtimes.table import verifiers_of
from lrc_edge.workspace import free_bytes

MOST_AT_ONCE = 3.0  # times fewer parameters than the teacher


def _check_quantize(plan: Plan) -> None:
    """Check that quantization-aware training is possible if the recipe asks for it."""
    q = plan.recipe.quantize
    if not q.tokens:
        return
    from lrc_edge.train.loop.quantized_stage import row_off_the_grid

    if not plan.trains_on_grid:
        raise UserError(f"quantize.tokens = {q.tokens}: trains the student on the grid of gguf:q4_0 and onnx:q4, and "
                        "neither is among the formats; add one, or set quantize.tokens=0")
    if row := row_off_the_grid(plan.student):
        raise UserError(f"quantize.tokens = {q.tokens}: a row of {row} does not divide into the Q4_0 grid's blocks of "
                        "32; set quantize.tokens=0")
    if q.teacher == "teacher" and not plan.trains:
        raise UserError("quantize.teacher = 'teacher': an export has none; leave it at 'student'")
    if not plan.recipe.data.sources:
        raise UserError(f"quantize.tokens = {q.tokens}: no text to train on; {WANTED} with --data")


def check(plan: Plan, out: Path) -> None:
    """Check everything that would stop the run later. Raises UserError."""
    if plan.trains:
        from lrc_edge.train.device import choose_device

        _check_name(plan)
        choose_device(plan.recipe.train.device)
        check_sources(plan.recipe)
        _check_rows(plan)
    if plan.trims_vocabulary:
        from lrc_edge.train.vocabulary import Vocabulary

        Vocabulary.of(plan.source.checkpoint).check_size(plan.student.vocab_size)
    if plan.formats:
        _check_quantize(plan)
    _check_runtimes(plan)
    _check_mixed_precision(plan)
    _check_disk(out, _build_bytes(plan) if plan.trains else _export_bytes(plan))


def fit_warnings(plan: Plan) -> list[str]:
    """Return a line for each of the plan's devices that the student will not fit."""
    return [fit.warning for fit in (check_fit(plan.student, profile) for profile in plan.profiles) if fit.warning]


def capacity_warning(plan: Plan) -> list[str]:
    """Return a line if the student is so much smaller than its teacher that one cut loses much."""
    ratio = plan.source.checkpoint.shape.n_params / plan.student.n_params
    if not plan.trains or ratio <= MOST_AT_ONCE or plan.hops:
        return []
    return [f"the student has {ratio:.1f} times fewer parameters than its teacher; above about {MOST_AT_ONCE:g} times, "
            "try student.hops (docs/shapes.md)"]


def _check_rows(plan: Plan) -> None:
    """Check that the block size of each format divides the row lengths of the matrices that the recipe resizes."""
    teacher, student = plan.source.checkpoint.shape, plan.student
    for (field, length), most in zip(row_lengths(student).items(), row_lengths(teacher).values(), strict=True):
        for row in plan.formats if length < most else ():
            if length % row.block:
                size = getattr(student, field)
                remain = [other.name for other in FORMATS.values() if length % other.block == 0]
                works = sizes_that_work(field, student, teacher, row.block)
                need = f"rows of a multiple of {row.block}" + (f" (nearest: {nearest(size, works)})" if works else "")
                raise UserError(f"student.{field} = {size}: {row.name} needs {need}; change it, or use one of: "
                                f"{', '.join(remain)}")


def _check_name(plan: Plan) -> None:
    name = plan.student_name
    if len(name) > LONGEST_NAME:
        raise UserError(f"student.name = {name[:20]}...: it has {len(name)} characters, and files are named after it; "
                        f"set student.name to at most {LONGEST_NAME}")
    name = plan.recipe.student.name
    if any(c in name for c in "/\\\0\n") or name.startswith("."):
        raise UserError(f"student.name = {name!r}: it names files; need one without / and \\ and no dot in front")


def check_sources(recipe: Recipe) -> None:
    if not recipe.data.sources:
        raise UserError(f"no data: the student learns from text; {WANTED} with --data, or --data self")
    for source in recipe.data.sources:
        if source != SELF and looks_local(source) and not Path(source).expanduser().exists():
            raise UserError(f"--data {source}: no such file or folder; {WANTED}")


def _check_runtimes(plan: Plan) -> None:
    """Check that the runtimes of the wanted formats can compute this model, or a student of it."""
    model = plan.source.checkpoint
    model.check_config()
    rows = len(model.tokenizer())
    if rows > model.shape.vocab_size:
        raise UserError(f"{model.path}: the tokenizer has {rows} tokens, the embedding {model.shape.vocab_size} rows; "
                        "get a tokenizer and weights that belong together")
    for kind in KINDS:
        if plan.formats and plan.writes(kind):
            verifiers_of(kind)  # raises if no runtime here could verify the files
    if plan.formats and plan.writes("gguf"):
        from lrc_edge.export.gguf.to_gguf import check_gguf
        from lrc_edge.export.quantize.encodings import ENCODINGS, check_imatrix

        for encoding in plan.encodings("gguf"):
            check_imatrix(ENCODINGS[encoding], plan.recipe.export.calibration_tokens > 0)
        check_gguf(model)
    if plan.writes("onnx"):
        from lrc_edge.export.onnx.rope import check_supported

        check_supported(model)


def _check_mixed_precision(plan: Plan) -> None:
    """Check that a model of this shape can have the size that the recipe asks for."""
    if plan.formats and plan.mixes_types:
        from lrc_edge.export.quantize.mixed_precision import check_size

        check_size(weights_of(plan.student), plan.recipe.export.bits_per_weight)


_LEAST_BYTES = 0.9  # per weight, to reserve disk: embedding and head have more bytes than `bytes_per_weight`


def _export_bytes(plan: Plan) -> float:
    """Return the bytes of the artifacts, of the lossless file for llama.cpp's quantizer, and of QAT."""
    recipe, n_params = plan.recipe, plan.student.n_params
    kept = sum(max(row.bytes_per_weight, _LEAST_BYTES) for row in plan.formats) + recipe.export.bits_per_weight / 8
    on_grid = _training_bytes(recipe, 4 * n_params) + 4.0 * n_params if recipe.quantize.tokens else 0.0
    return n_params * (kept + 4.0) + on_grid


def _training_bytes(recipe: Recipe, trained: float) -> float:
    """Return the bytes of the kept checkpoints (with both Adam moments), one being written, and the result."""
    return (3 * (recipe.train.keep_checkpoints + 1) + 1) * trained


def _build_bytes(plan: Plan) -> float:
    from lrc_edge.train.start.stage import stream_bytes

    recipe, student = plan.recipe, plan.student
    teacher = replace(plan.source.checkpoint.shape, vocab_size=student.vocab_size)
    projections = 4 * teacher.hidden_size * student.hidden_size * (7 * teacher.num_hidden_layers + 2)
    trained = max(projections, 4 * student.n_params) if recipe.train.dense_share else projections
    identity = 4 * teacher.n_params  # the teacher folded through P = I; removed before training
    tokens = recipe.train.tokens * (2 if teacher.vocab_size <= 2**16 else 4)
    # The start of each student: what its first phase trains, and two projections per layer.
    starts = sum(4 * shape.n_params + 8 * shape.num_hidden_layers * teacher.hidden_size * shape.hidden_size
                 for shape in plan.shapes) if recipe.train.dense_share == 1 else projections
    hops = sum(_training_bytes(recipe, 4 * shape.n_params) for shape in plan.hops)
    training = _training_bytes(recipe, trained) + 4 * student.n_params + starts + hops
    timed = 0.6 * teacher.n_params if plan.times_teacher else 0  # the teacher in 4 bits
    trimmed = _stored_bytes(plan.source.checkpoint, teacher) if plan.trims_vocabulary else 0
    begins = max(map(stream_bytes, (teacher, *plan.shapes), plan.shapes))
    return trimmed + tokens + max(identity, begins, training + _export_bytes(plan) + timed)


def _stored_bytes(model: DenseCheckpoint, shape: ModelShape) -> int:
    """Return the bytes of a model of this shape with the stored types of `model`."""
    return sum(weight.numel * model.types[weight.name].itemsize for weight in weights_of(shape))


def _check_disk(out: Path, needed: float) -> None:
    """Raise UserError if the disk is too small. needed: bytes of the finished build, of which some may exist."""
    needed -= sum(file.lstat().st_size for file in out.rglob("*") if file.is_file())
    free = free_bytes(out.resolve())
    if free < needed:
        raise UserError(f"{out}: needs about {human_bytes(needed)}, {human_bytes(free)} are free; "
                        "free some space or give an --out on another disk")
