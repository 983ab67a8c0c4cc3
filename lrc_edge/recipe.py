"""The recipe: everything that a build can be told, as frozen dataclasses read from TOML. Defaults live only here.

A key that is not a field is refused with the nearest name. `--set section.key=value` goes through the same door.
"""
from __future__ import annotations

import difflib
import json
import math
import tomllib
import typing
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from lrc_edge.corpus.sources import SELF
from lrc_edge.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Student:
    """Shape of the student; what is not named here is the teacher's."""

    hidden_size: int = 0  # residual width; 0: half the teacher's, rounded down to a multiple of 256, 64 or 32
    name: str = ""  # of the files and the model card; empty: <teacher>-LRC-<hidden_size>


@dataclass(frozen=True, kw_only=True)
class Data:
    """The text: distilled on, and held out for evaluation and proof."""

    # .txt, .jsonl, .parquet, a folder of them, a hub dataset (name:config:split), or `self`: the teacher's own samples
    sources: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()  # each source's share of the tokens, in any unit; empty: one source after another
    text_field: str = "text"  # of jsonl, parquet and hub rows
    messages_field: str = "messages"  # of rows that are conversations: only the answers are learnt; empty: none are
    isolate_documents: bool = False  # no attention from one document to the one before it in the row
    cache: str = ""  # a folder that keeps tokenized corpora for other builds; empty: tokens live in the build alone
    held_out_share: float = 0.02  # of the documents, chosen by hash; at most 200,000 tokens are kept


# Peak learning rate x the student's hidden_size: best of a grid in both phases at widths 128 and 256 of a 512-wide one
# (docs/LOG.md). That it falls with the width is what muP says of Adam (arXiv 2203.03466): 2.6e-4 for a student of 1536.
PEAK_RATE, MAX_RATE = 0.4, 3e-3


@dataclass(frozen=True, kw_only=True)
class Train:
    """A clone phase, then a dense one. Loss = lm_weight * LM + kl_weight * KL + alpha * clone (arXiv 2505.12781)."""

    tokens: int = 0  # the budget; 0: one pass over the data; more than the data holds: several passes
    seq_len: int = 2048  # at most the teacher's max_position_embeddings
    batch_tokens: int = 0  # of an optimizer step; 0: a 400th of the budget, at least 4,096 and at most 32,768
    micro_batch: int = 8  # sequences in one forward pass of one process; the rest is gradient accumulation
    # Peaks of the phases. 0: PEAK_RATE / the student's hidden_size, at most MAX_RATE.
    learning_rate: float = 0.0
    dense_learning_rate: float = 0.0
    warmup_share: float = 0.02  # of the steps, linear, in each phase; then linear to zero over the run
    max_grad_norm: float = 1.0
    # pca: principal components of the residual stream; selection: its strongest channels (RED); gaussian: as published
    init: Literal["pca", "selection", "gaussian"] = "pca"
    # The last share of the steps trains the student's matrices themselves (Train What You Deploy, arXiv 2609.02006);
    # the steps before it train the projections that make them (Low-Rank Clone). From where `pca` starts, dense steps
    # alone do best (benchmarks/sample_efficiency.py).
    dense_share: float = 1.0
    alpha: float = 0.2  # weight of the clone terms in the clone phase
    dense_alpha: float = 0.2  # in the dense phase
    # relative: squared error over the teacher's mean square, so that alpha means the same for every teacher; absolute:
    # the published mean squared error
    clone_terms: Literal["relative", "absolute"] = "relative"
    kl_weight: float = 1.0
    lm_weight: float = 1.0
    kl_temperature: float = 1.0  # the KL is per token and scaled by its square
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 where the processor computes in it
    device: Literal["auto", "cpu", "cuda"] = "auto"
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile; auto: on a GPU
    gradient_checkpointing: bool = False  # the student's layers are computed again in the backward pass: less memory
    workers: int = 2  # processes that read rows ahead, for a GPU; on a CPU there are none
    seed: int = 0
    eval_every: int = 100  # steps between evaluations on held-out text
    checkpoint_every: int = 200  # steps between checkpoints
    keep_checkpoints: int = 2
    log_every: int = 10
    # A batch is bad when a loss is not finite or above spike_factor times its running average (0: no such limit). It
    # never reaches the weights; `stop` ends the run with its name, `skip` goes on without it.
    on_bad_batch: Literal["stop", "skip"] = "stop"
    spike_factor: float = 5.0


# Peak learning rate x the student's hidden_size of the quantization-aware phase: best of a grid (docs/LOG.md).
QUANTIZED_RATE = 0.01


@dataclass(frozen=True, kw_only=True)
class Quantize:
    """A last phase on the grid of gguf:q4_0 and onnx:q4, which are then made of its weights; the other files are not.

    The student's matrices pass through that grid in every forward pass, and learn to say what they said before it.
    """

    tokens: int = 0  # of the phase; 0: none
    teacher: Literal["student", "teacher"] = "student"  # whom to copy: the student itself, unquantized, or its teacher
    alpha: float = 1.0  # weight of the clone terms between the student's layers and its own, unquantized
    batch_tokens: int = 0  # of an optimizer step; 0: a 500th of the budget, at least 1,024 and at most 32,768
    learning_rate: float = 0.0  # its peak; 0: QUANTIZED_RATE / the student's hidden_size


@dataclass(frozen=True, kw_only=True)
class Export:
    """What to write. GGUF encodings are llama.cpp's names. ONNX has fp32, fp16, q8 (the numbers of GGUF's Q8_0) and q4
    (those of its Q4_0)."""

    # Empty: gguf:f16, gguf:q8_0 and onnx:fp32; from a width that 256 divides also gguf:q4_k_m, gguf:q4_0 and onnx:q4.
    # Narrower models are so small that 4 bits save little, and lose much (docs/LOG.md).
    formats: tuple[str, ...] = ()
    # Devices by the name or file of their profile (`lrc-edge targets`): what they run best is written instead of the
    # default, beside what `formats` names, and checked in their runtimes.
    targets: tuple[str, ...] = ()
    calibration_tokens: int = 16_384  # of text apart from the proof's, for the quantizer's importance matrix; 0: none
    # Above 0: one more GGUF, each of its matrices in the type that, as measured, loses least at this size (mixed
    # precision); all tensors counted. docs/quantization.md.
    bits_per_weight: float = 0.0
    # 0: activations stay float32; 4: onnxruntime rounds them to int8, as llama.cpp does: twice as fast at the same KL
    onnx_accuracy_level: int = 4


@dataclass(frozen=True, kw_only=True)
class Parity:
    """How much the proof looks at."""

    positions: int = 2048  # teacher-forced, prefill and decode each; fewer only where the held-out text is shorter
    row_len: int = 256  # tokens of one teacher-forced row
    # One row of each of these lengths, too, as far as the model's context goes; 0: the whole context.
    long_rows: tuple[int, ...] = (4096, 0)
    long_positions: int = 32  # of each long row, spread over it, prefill and decode each
    long_seconds: float = 60.0  # a row that PyTorch would read for longer is cut
    kv_cache_positions: int = 512  # for each type of llama.cpp's KV cache (f16, q8_0, q4_0)
    near_tie: float = 0.01  # top-1 is not judged where the reference's two best logits are closer than this
    generate_tokens: int = 64  # of each sample text
    prompts: tuple[str, ...] = ()  # empty: the beginnings of held-out documents


@dataclass(frozen=True, kw_only=True)
class Gates:
    """Limits of the proof, for a trained student. KL in nats a token."""

    # The largest difference of a logit where the weights are the same (fold, P = I, ONNX fp32), in units of PyTorch's
    # own rounding: the largest difference between its float32 and its float64 logits. A larger model has larger logits.
    max_abs_rounding: float = 8.0
    copy_top1: float = 1.0  # of the fold, and of P = I
    gguf_f32_kl: float = 1e-6
    gguf_f32_top1: float = 0.999
    gguf_f16_kl: float = 1e-4
    gguf_bf16_kl: float = 1e-3
    gguf_q8_0_kl: float = 5e-3
    quantized_kl: float = 0.15  # every other type, GGUF and ONNX
    # Files of a student trained on their grid, against that student: blocks with exactly its weights, and what is left
    # when the runtimes round activations to 8 bits.
    identical_blocks: float = 0.99
    on_grid_kl: float = 0.01
    onnx_fp32_kl: float = 1e-8
    onnx_fp16_kl: float = 1e-4
    onnx_q8_kl: float = 5e-3
    # On devices the same limits of KL, and of the share of equal argmax: of 16 and 32 bits, of 8 bits, of every other.
    unquantized_top1: float = 0.99
    q8_top1: float = 0.95
    quantized_top1: float = 0.75


@dataclass(frozen=True, kw_only=True)
class Recipe:
    student: Student = field(default_factory=Student)
    data: Data = field(default_factory=Data)
    train: Train = field(default_factory=Train)
    quantize: Quantize = field(default_factory=Quantize)
    export: Export = field(default_factory=Export)
    parity: Parity = field(default_factory=Parity)
    gates: Gates = field(default_factory=Gates)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def load_recipe(file: Path | str | None = None, settings: Iterable[str] = (), **overrides: Mapping[str, Any]
                ) -> Recipe:
    """The recipe of a TOML file, or of one that comes along, by its name (train/recipes); then `section.key=value`
    settings, then `overrides` (section=dict), on the defaults.

    Raises UserError on an unreadable file, an unknown key (with the nearest), a wrong type or an impossible value.
    """
    table: dict[str, Any] = {}
    if file is not None:
        shipped = {path.name.removesuffix(".toml"): path for path in (files("lrc_edge.train") / "recipes").iterdir()}
        source = shipped.get(str(file), Path(file)) if not Path(file).exists() else Path(file)
        try:
            table = tomllib.loads(source.read_text())
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{file}: cannot read the recipe ({error}); give a TOML file, or one of "
                            f"{', '.join(sorted(shipped))}") from error
        except (tomllib.TOMLDecodeError, RecursionError) as error:
            raise UserError(f"{file}: not TOML: {error}; fix the line") from error
    where = {key: str(file) for key in table}
    for setting in settings:
        key, equals, text = setting.partition("=")
        section, dot, name = key.strip().partition(".")
        if not equals or not dot:
            raise UserError(f"--set {setting}: need section.key=value, as in --set student.hidden_size=1024")
        where[section] = f"--set {setting}"
        if not isinstance(table.setdefault(section, {}), dict):
            raise UserError(f"{file}: {section} is not a table; write [{section}]")
        table[section][name] = _parse_value(text.strip())
    for section, values in overrides.items():
        table.setdefault(section, {}).update(values)
    recipe = _build(Recipe, table, lambda key: where.get(key, "recipe"), "")
    _check(recipe)
    return replace(recipe, export=replace(recipe.export, targets=tuple(map(_absolute, recipe.export.targets))))


def recorded_recipe(table: Mapping[str, Any], where: Path | str) -> Recipe:
    """The recipe that a finished build recorded. Raises UserError naming `where` when this version has other keys."""
    try:
        return load_recipe(None, (), **table)
    except UserError as error:
        raise UserError(f"{where}: made by another version of lrc-edge ({error}); build it again") from error


def _absolute(target: str) -> str:
    """A profile's file may be read again from another directory; a name stays."""
    is_file = "/" in target or target.endswith(".toml")
    return str(Path(target).expanduser().resolve()) if is_file else target


def _parse_value(text: str) -> Any:
    """A TOML value; what is not one is a plain string."""
    try:
        return tomllib.loads(f"x = {text}")["x"]
    except (tomllib.TOMLDecodeError, RecursionError):
        return text


def _build(cls: type, table: Mapping[str, Any], where: typing.Callable[[str], str], prefix: str) -> Any:
    hints = typing.get_type_hints(cls)
    known = {f.name: hints[f.name] for f in fields(cls)}
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key not in known:
            raise UserError(f"{where(key)}: unknown recipe key {prefix + key!r}; {_hint(key, list(known))}")
        if is_dataclass(known[key]):
            if not isinstance(value, Mapping):
                raise UserError(f"{where(key)}: {key} = {value!r}: need a table; write [{key}]")
            source = where(key)
            values[key] = _build(typing.cast(type, known[key]), value, partial(_constant, source), f"{key}.")
        else:
            values[key] = _convert(value, known[key], f"{where(key)}: {prefix + key}")
    return cls(**values)


def _constant(value: str, _: str) -> str:
    return value


def _hint(key: str, known_here: list[str]) -> str:
    """The nearest key of any section, for a slip of the pen or of the section."""
    sections = typing.get_type_hints(Recipe)
    full_names = {f.name: f"{section}.{f.name}" for section, cls in sections.items() for f in fields(cls)}
    near = difflib.get_close_matches(key, [*known_here, *full_names], n=1, cutoff=0.7)
    if not near:
        return f"known here: {', '.join(known_here)}"
    return f"did you mean {full_names.get(near[0], near[0])}?"


def _convert(value: Any, hint: Any, where: str) -> Any:
    origin = typing.get_origin(hint)
    if origin is Literal:
        choices = typing.get_args(hint)
        if value not in choices:
            raise UserError(f"{where} = {value!r}: need one of {', '.join(map(str, choices))}")
        return value
    if origin is tuple:
        return _convert_list(value, typing.get_args(hint)[0], where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    # 10e9 reads well for a token budget.
    if hint is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise UserError(f"{where} = {value!r}: need {'a whole number' if hint is int else f'a {hint.__name__}'}")
    return value


def _convert_list(value: Any, kind: type, where: str) -> tuple[Any, ...]:
    """A list, or its items between commas, or one number."""
    items = [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value
    if kind is not str and isinstance(items, int | float):
        items = [items]
    allowed = {float: (str, int, float), int: (str, int), str: (str,)}[kind]
    if isinstance(items, list | tuple) and all(isinstance(i, allowed) and not isinstance(i, bool) for i in items):
        try:
            return tuple(kind(item) for item in items)
        except ValueError:
            pass  # a word among the numbers
    raise UserError(f"{where} = {value!r}: need a list of {'strings' if kind is str else 'numbers'}")


def _check_data(recipe: Recipe) -> None:
    d = recipe.data
    if not 0 < d.held_out_share < 1:
        raise UserError(f"recipe: data.held_out_share = {d.held_out_share}: need a share between 0 and 1")
    if d.weights and len(d.weights) != len(d.sources):
        raise UserError(f"recipe: data.weights: {len(d.weights)} weights for {len(d.sources)} sources; need one each")
    if bad := [w for w in d.weights if not 0 < w < math.inf]:
        raise UserError(f"recipe: data.weights: {bad[0]} is no share; need numbers above 0, leave a source out instead")
    if d.sources.count(SELF) > 1:
        raise UserError("recipe: data.sources has `self` more than once; need it once, with a weight")
    if SELF in d.sources and not recipe.train.tokens:
        raise UserError("recipe: data.sources has `self`: a teacher never stops talking; "
                        "say how much with --set train.tokens=...")


def _check(recipe: Recipe) -> None:
    t, p = recipe.train, recipe.parity
    at_least_1 = {"train.seq_len": t.seq_len, "train.micro_batch": t.micro_batch, "train.eval_every": t.eval_every,
                  "train.checkpoint_every": t.checkpoint_every, "train.log_every": t.log_every,
                  "train.keep_checkpoints": t.keep_checkpoints,
                  "parity.positions": p.positions, "parity.row_len": p.row_len,
                  "parity.generate_tokens": p.generate_tokens, "parity.long_positions": p.long_positions,
                  "parity.kv_cache_positions": p.kv_cache_positions}
    above_0: dict[str, float] = {"train.kl_temperature": t.kl_temperature,
                                 "train.max_grad_norm": t.max_grad_norm}
    not_negative: dict[str, float] = {"train.tokens": t.tokens, "train.batch_tokens": t.batch_tokens,
                                      "train.learning_rate": t.learning_rate, "train.alpha": t.alpha,
                                      "train.dense_alpha": t.dense_alpha,
                                      "train.dense_learning_rate": t.dense_learning_rate, "train.workers": t.workers,
                                      "quantize.tokens": recipe.quantize.tokens,
                                      "quantize.alpha": recipe.quantize.alpha,
                                      "quantize.batch_tokens": recipe.quantize.batch_tokens,
                                      "quantize.learning_rate": recipe.quantize.learning_rate,
                                      "export.calibration_tokens": recipe.export.calibration_tokens,
                                      "export.bits_per_weight": recipe.export.bits_per_weight,
                                      "student.hidden_size": recipe.student.hidden_size,
                                      "train.kl_weight": t.kl_weight, "train.lm_weight": t.lm_weight,
                                      "train.warmup_share": t.warmup_share, "parity.near_tie": p.near_tie,
                                      "parity.long_seconds": p.long_seconds,
                                      "parity.long_rows": min(p.long_rows, default=0)}
    for name, count in at_least_1.items():
        if count < 1:
            raise UserError(f"recipe: {name} = {count}: need at least 1")
    for name, value in above_0.items():
        if not value > 0:
            raise UserError(f"recipe: {name} = {value}: need more than 0")
    for name, value in not_negative.items():
        if not value >= 0:
            raise UserError(f"recipe: {name} = {value}: need 0 or more")
    _check_data(recipe)
    if recipe.export.bits_per_weight and not recipe.export.calibration_tokens:
        raise UserError(f"recipe: export.bits_per_weight = {recipe.export.bits_per_weight:g}: what a matrix suffers is "
                        "measured on calibration text; set export.calibration_tokens above 0")
    if 0 < t.spike_factor <= 1:
        raise UserError(f"recipe: train.spike_factor = {t.spike_factor}: need more than 1, or 0 for no limit")
    if not 0 <= t.dense_share <= 1:
        raise UserError(f"recipe: train.dense_share = {t.dense_share}: need a share between 0 and 1")
    if t.warmup_share >= 1:
        raise UserError(f"recipe: train.warmup_share = {t.warmup_share}: need less than 1")
    alphas = [t.alpha] * (t.dense_share < 1) + [t.dense_alpha] * (t.dense_share > 0)
    if t.lm_weight == t.kl_weight == 0 and not all(alphas):
        raise UserError("recipe: train.lm_weight, train.kl_weight and the alpha of a phase are all 0: nothing to train")


def to_toml(recipe: Recipe) -> str:
    """The recipe as TOML that `load_recipe` reads back to the same recipe."""
    def value(item: Any) -> str:
        if isinstance(item, tuple):
            return "[" + ", ".join(json.dumps(part) for part in item) + "]"
        return json.dumps(item) if isinstance(item, str) else str(item).lower() if isinstance(item, bool) else str(item)

    lines: list[str] = []
    for section, table in recipe.as_dict().items():
        lines += [f"[{section}]", *(f"{key} = {value(item)}" for key, item in table.items()), ""]
    return "\n".join(lines)
