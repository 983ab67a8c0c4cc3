"""The recipe: every setting of a build, as frozen dataclasses that are read from TOML. Defaults live only here.

Each key carries its explanation, which `to_toml` prints, and its bounds, which `load_recipe` checks. An unknown key is
refused with the nearest known name. `--set section.key=value` is validated in the same way.
"""
from __future__ import annotations

import difflib
import json
import math
import operator
import textwrap
import tomllib
import typing
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, TypeVar

from lrc_edge.corpus.filters import Filters
from lrc_edge.corpus.sources import SELF
from lrc_edge.errors import UserError

Value = TypeVar("Value")

# What a bound of `key` demands of the value, and how the error words it.
BOUNDS = {"at_least": (operator.ge, "at least"), "above": (operator.gt, "more than"),
          "at_most": (operator.le, "at most"), "below": (operator.lt, "less than")}


def key(default: Value, help: str, **bounds: float) -> Value:
    """A recipe key: its default, the comment that `to_toml` prints, and BOUNDS of the value (of each list item)."""
    if unknown := bounds.keys() - BOUNDS.keys():
        raise ValueError(f"recipe key: unknown bounds {sorted(unknown)}; known {sorted(BOUNDS)}")
    return typing.cast(Value, field(default=default, metadata={"help": help, "bounds": bounds}))


# Peak learning rate x the student's hidden_size of quantization-aware training: best of a grid (docs/LOG.md).
QUANTIZED_RATE = 0.01


@dataclass(frozen=True, kw_only=True)
class Student:
    """Shape of the student, by Hugging Face's names. 0 = as in the teacher. If all are 0, the student has half the
    teacher's hidden_size, rounded down to a multiple of 256, 64 or 32."""

    hidden_size: int = key(0, "residual width", at_least=0)
    num_hidden_layers: int = key(0, "layers; which of the teacher's stay is found by trying (docs/shapes.md)",
                                 at_least=0)
    intermediate_size: int = key(0, "FFN neurons of each layer", at_least=0)
    num_attention_heads: int = key(0, "query heads, a multiple of num_key_value_heads", at_least=0)
    num_key_value_heads: int = key(
        0, "key/value heads, a divisor of the teacher's; the KV cache shrinks with them", at_least=0)
    vocab_size: int = key(
        0, "tokens of the vocabulary; a smaller one keeps the tokens that are most frequent in the data "
           "(docs/training.md)", at_least=0)
    hops: tuple[str, ...] = key(
        (), "larger students that are trained first, each cut from the one before, as in [\"num_hidden_layers=20\", "
            "\"num_hidden_layers=18 intermediate_size=6144\"]; sizes that are not named are those before "
            "(docs/shapes.md)")
    name: str = key("", "name in file names and the model card; empty = <teacher>-Edge-<hidden_size>, or "
                         "<teacher>-LRC-<hidden_size> if there is a clone phase, and the other sizes that change")


@dataclass(frozen=True, kw_only=True)
class Data:
    """The text: what the student is trained on, and what is held out for evaluation and verification (docs/data.md)."""

    sources: tuple[str, ...] = key(
        (), ".txt, .jsonl or .parquet files, folders of them, hub datasets (name:config:split), or `self`: the "
            "teacher's own samples")
    weights: tuple[float, ...] = key(
        (), "each source's share of the tokens, in any unit; empty = one source after another")
    text_field: str = key("text", "field that holds the text in jsonl, parquet and hub records")
    messages_field: str = key(
        "messages", "field that holds a conversation; empty = no conversations")
    conversation_loss: Literal["answers", "all"] = key(
        "answers", "tokens of a conversation that the loss covers: the assistant's answers, or all")
    filters: tuple[str, ...] = key(
        (), "conditions on numeric fields of jsonl, parquet and hub records, as in \"score >= 4\" or "
            "\"metadata.int_score >= 4\" (a nested field); records without the field are kept")
    isolate_documents: bool = key(
        False, "true = no attention from one document to earlier documents in the same sequence")
    cache: str = key("", "folder that keeps tokenized corpora for other builds; empty = tokens stay in the build")
    held_out_share: float = key(
        0.02, "share of the documents to hold out, chosen by hash; at most 200,000 tokens of them are kept",
        above=0, below=1)


@dataclass(frozen=True, kw_only=True)
class Train:
    """A clone phase, then a dense phase. Loss = lm_weight * LM + kl_weight * KL + alpha * clone (arXiv 2505.12781). In
    the dense phase, dense_alpha replaces alpha."""

    tokens: int = key(
        0, "training tokens; 0 = one pass over the data; more than the data holds = several passes", at_least=0)
    seq_len: int = key(2048, "tokens per sequence; at most the teacher's max_position_embeddings", at_least=1)
    batch_tokens: int = key(
        0, "tokens per optimizer step; 0 = budget / 2,000, clamped to 1,024..32,768", at_least=0)
    micro_batch: int = key(
        8, "sequences per forward pass of one process; the rest of a step is gradient accumulation", at_least=1)
    learning_rate: float = key(
        0.0, "peak learning rate of the clone phase; 0 = chosen from the student's width, the number of steps, their "
             "tokens, and how far the student starts from its teacher (docs/training.md)", at_least=0)
    dense_learning_rate: float = key(0.0, "peak learning rate of the dense phase; 0 = chosen likewise", at_least=0)
    warmup_share: float = key(
        0.0, "linear warmup at the beginning of the clone phase, as a share of all steps; 0 = a fiftieth of them, but "
             "at least 20 steps, or a fifth if there are fewer than 100. Over the run, the rate falls linearly to 0",
        at_least=0, below=1)
    dense_warmup_share: float = key(0.0, "the same at the beginning of the dense phase", at_least=0, below=1)
    max_grad_norm: float = key(1.0, "the gradient norm is clipped to this", above=0)
    init: Literal["pca", "selection", "gaussian"] = key(
        "pca", "pca = principal components of the residual stream; selection = its strongest channels (RED); gaussian "
               "= random, as published")
    dense_share: float = key(
        1.0, "last share of the steps, which trains the student's matrices directly (Train What You Deploy, arXiv "
             "2609.02006); the steps before it train the projections that make them (Low-Rank Clone)",
        at_least=0, at_most=1)
    hop_share: float = key(0.5, "share of the tokens for all hops of student.hops together", above=0, below=1)
    alpha: float = key(0.2, "weight of the clone loss in the clone phase", at_least=0)
    dense_alpha: float = key(0.2, "weight of the clone loss in the dense phase", at_least=0)
    clone_terms: Literal["relative", "per_token", "absolute"] = key(
        "relative", "relative = squared error of a sequence / the teacher's mean square in it, so that alpha means the "
                    "same for every teacher; per_token = the same for each token, so that a few tokens with huge "
                    "activations do not dominate the loss; absolute = mean squared error, as published")
    kl_weight: float = key(1.0, "weight of the KL divergence from the teacher", at_least=0)
    lm_weight: float = key(1.0, "weight of the cross entropy", at_least=0)
    kl_temperature: float = key(1.0, "temperature of the KL, which is per token and scaled by temperature^2", above=0)
    precision: Literal["auto", "bf16", "fp32"] = key("auto", "auto = bf16 if the processor computes in it, else fp32")
    teacher_precision: Literal["auto", "fp8"] = key(
        "auto", "type of the linear layers in the teacher's forward passes: auto = as `precision`; fp8 = e4m3 with a "
                "scale per row, for GPUs since Hopper; a CPU emulates it (docs/training.md)")
    device: Literal["auto", "cpu", "cuda"] = key("auto", "auto = a GPU if there is one")
    compile: Literal["auto", "on", "off"] = key("auto", "torch.compile; auto = on a GPU only")
    gradient_checkpointing: bool = key(
        False, "true = recompute the student's layers in the backward pass: less memory, more time")
    workers: int = key(2, "processes that read sequences ahead for a GPU; a CPU uses none", at_least=0)
    seed: int = key(0, "seed of the data order, of samples and of the random parts of the initialization")
    eval_every: int = key(100, "steps between evaluations on held-out text", at_least=1)
    checkpoint_every: int = key(200, "steps between checkpoints", at_least=1)
    keep_checkpoints: int = key(2, "number of checkpoints to keep", at_least=1)
    log_every: int = key(10, "steps between lines in the log", at_least=1)
    on_bad_batch: Literal["stop", "skip"] = key(
        "stop", "a bad batch has a loss or gradient that is not finite, or a loss above its limit (spike_factor), and "
                "never changes the weights; stop = end the run and name it, skip = continue without it")
    spike_factor: float = key(
        5.0, "limit of a loss in units of its running average, but never less than 1 above the average; 0 = no limit")


@dataclass(frozen=True, kw_only=True)
class Quantize:
    """Quantization-aware training, a last phase for gguf:q4_0 and onnx:q4 (docs/quantization.md).

    Every forward pass rounds the student's matrices to the values that these files can store. The student learns to
    reproduce its own unquantized outputs. Other files are not affected.
    """

    tokens: int = key(0, "training tokens of this phase; 0 = no such phase", at_least=0)
    teacher: Literal["student", "teacher"] = key(
        "student", "model to distil from: the student itself, unquantized, or its teacher")
    alpha: float = key(1.0, "weight of the clone loss between the layers of the student and of the unquantized student",
                       at_least=0)
    batch_tokens: int = key(
        0, "tokens per optimizer step; 0 = budget / 500, clamped to 1,024..32,768", at_least=0)
    learning_rate: float = key(
        0.0, f"peak learning rate; 0 = {QUANTIZED_RATE} / the student's hidden_size", at_least=0)


@dataclass(frozen=True, kw_only=True)
class Export:
    """Which files to write. GGUF encodings have llama.cpp's names. ONNX has fp32, fp16, q8 and q4; q8 and q4 store the
    same weights as GGUF Q8_0 and Q4_0."""

    formats: tuple[str, ...] = key(
        (), "formats to write, as in gguf:q4_0; empty = gguf:f16, gguf:q8_0 and onnx:fp32, and also gguf:q4_k_m, "
            "gguf:q4_0 and onnx:q4 if 256 divides the width (narrower models lose much at 4 bits and save little)")
    targets: tuple[str, ...] = key(
        (), "devices, by name (`lrc-edge targets`) or profile file; the formats that run best there are written in "
            "place of the default, in addition to `formats`, and checked in the device's runtimes")
    calibration_tokens: int = key(
        16_384, "tokens for the quantizer's importance matrix, none of them from the verification text; 0 = no matrix",
        at_least=0)
    bits_per_weight: float = key(
        0.0, "bits per weight of one more GGUF with mixed precision, counting all tensors: each matrix gets its own "
             "type, chosen for the least predicted KL (docs/quantization.md); 0 = no such file", at_least=0)
    onnx_accuracy_level: int = key(
        4, "activations in ONNX q8 and q4: 0 = float32; 4 = rounded to int8 as in llama.cpp, for q4 about twice as "
           "fast with a KL 1 to 2 % higher")


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What the student may cost on the device of export.targets, which must be one. 0 = no limit.

    If all sizes in [student] are 0, a build with a budget chooses them first, as `lrc-edge plan` does
    (docs/planner.md).
    """

    tokens_per_second: float = key(0.0, "least speed of an answer at the end of the context", at_least=0,
                                   below=math.inf)
    time_to_first_token: float = key(0.0, "most seconds until the first token after a prompt that fills the context",
                                     at_least=0, below=math.inf)
    memory: float = key(0.0, "most RAM, in MB", at_least=0, below=math.inf)
    file_size: float = key(0.0, "largest file, in MB", at_least=0, below=math.inf)
    context: int = key(0, "tokens of context; 0 = the device's", at_least=0)
    format: str = key("", "format of the file that is meant, as in onnx:q4; empty = the device's recommended one")
    search: Literal["none", "short", "full"] = key(
        "short", "none = choose by what cuts cost elsewhere; short = by short training runs of about ten shapes; "
                 "full = of about a hundred, in three bins of speed or size")
    timings: str = key(
        "", "file of timings that `lrc-edge plan --time-anchors` wrote on the device; empty = this machine is timed if "
            "it is the device, and otherwise speeds are estimated")


@dataclass(frozen=True, kw_only=True)
class Parity:
    """How much text verification reads (docs/verification.md)."""

    positions: int = key(
        2048, "teacher-forced positions for prefill and for decode; fewer if the held-out text is shorter", at_least=1)
    row_len: int = key(256, "tokens per teacher-forced sequence", at_least=1)
    long_rows: tuple[int, ...] = key(
        (4096, 0), "lengths of one more sequence each, at most the model's context; 0 = the full context", at_least=0)
    long_positions: int = key(
        32, "positions spread over each long sequence, for prefill and for decode", at_least=1)
    long_seconds: float = key(60.0, "a sequence that PyTorch would read for longer than this is shortened", at_least=0)
    kv_cache_positions: int = key(512, "positions for each type of llama.cpp's KV cache (f16, q8_0, q4_0)", at_least=1)
    near_tie: float = key(
        0.01, "top-1 ignores positions where PyTorch's two best logits differ by less than this", at_least=0)
    generate_tokens: int = key(64, "tokens per sample text", at_least=1)
    prompts: tuple[str, ...] = key((), "prompts of the sample texts; empty = beginnings of held-out documents")


@dataclass(frozen=True, kw_only=True)
class Gates:
    """Limits of verification, for a trained student. KL is in nats per token."""

    max_abs_rounding: float = key(
        8.0, "maximum difference of a logit if the weights are the same (fold, P = I, ONNX fp32), in units of "
             "PyTorch's own rounding: the largest difference between its float32 and its float64 logits. Larger models "
             "have larger logits")
    copy_top1: float = key(1.0, "minimum top-1 of the fold, and of the full-width clone (P = I)")
    gguf_f32_kl: float = key(1e-6, "maximum KL of GGUF F32")
    gguf_f32_top1: float = key(0.999, "minimum top-1 of GGUF F32")
    gguf_f16_kl: float = key(1e-4, "maximum KL of GGUF F16")
    gguf_bf16_kl: float = key(1e-3, "maximum KL of GGUF BF16")
    gguf_q8_0_kl: float = key(5e-3, "maximum KL of GGUF Q8_0")
    quantized_kl: float = key(0.15, "maximum KL of every other type, GGUF and ONNX")
    identical_blocks: float = key(
        0.99, "after quantization-aware training: minimum share of a file's blocks that equal the trained weights")
    on_grid_kl: float = key(
        0.01, "after quantization-aware training: maximum KL from the trained student. What remains is the rounding of "
              "activations to 8 bits in the runtimes")
    onnx_fp32_kl: float = key(1e-8, "maximum KL of ONNX fp32")
    onnx_fp16_kl: float = key(1e-4, "maximum KL of ONNX fp16")
    onnx_q8_kl: float = key(5e-3, "maximum KL of ONNX q8")
    unquantized_top1: float = key(0.99, "on devices: minimum top-1 of 16 and 32 bits; the KL limits are those above")
    q8_top1: float = key(0.95, "on devices: minimum top-1 of 8 bits")
    quantized_top1: float = key(0.75, "on devices: minimum top-1 of every other type")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All settings of a build, by section."""

    student: Student = field(default_factory=Student)
    data: Data = field(default_factory=Data)
    train: Train = field(default_factory=Train)
    quantize: Quantize = field(default_factory=Quantize)
    export: Export = field(default_factory=Export)
    budget: Budget = field(default_factory=Budget)
    parity: Parity = field(default_factory=Parity)
    gates: Gates = field(default_factory=Gates)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def load_recipe(file: Path | str | None = None, settings: Iterable[str] = (), **overrides: Mapping[str, Any]
                ) -> Recipe:
    """Read a TOML file or a built-in recipe, by name (train/recipes), then apply `settings` and `overrides`.

    settings: "section.key=value" each. overrides: section=dict. Keys that are not set have their defaults.
    Raises UserError on an unreadable file, an unknown key (with the nearest known one), a wrong type or an impossible
    value.
    """
    table: dict[str, Any] = {}
    if file is not None:
        shipped = {path.name.removesuffix(".toml"): path for path in (files("lrc_edge.train") / "recipes").iterdir()}
        source = shipped.get(str(file), Path(file)) if not Path(file).exists() else Path(file)
        try:
            table = tomllib.loads(source.read_text())
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{file}: cannot read the recipe ({error}); pass a TOML file, or one of "
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
    """Return the recipe that a build recorded. Raises UserError naming `where` if this version has other keys."""
    try:
        return load_recipe(None, (), **table)
    except UserError as error:
        raise UserError(f"{where}: made by another version of lrc-edge ({error}); build it again") from error


def _absolute(target: str) -> str:
    """Make the path of a profile file absolute, so that it can be read from another directory; keep a name."""
    is_file = "/" in target or target.endswith(".toml")
    return str(Path(target).expanduser().resolve()) if is_file else target


def _parse_value(text: str) -> Any:
    """Parse a TOML value; anything else is a plain string."""
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
    """Suggest the nearest key of any section: the name or the section may be mistyped."""
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
    """Convert a list, a comma-separated string or one number to a tuple of `kind`."""
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


def _check_bounds(recipe: Recipe) -> None:
    for section in fields(recipe):
        table = getattr(recipe, section.name)
        for f in fields(table):
            given, bounds = getattr(table, f.name), f.metadata["bounds"]
            for item in given if isinstance(given, tuple) else [given]:
                if not all(BOUNDS[name][0](item, limit) for name, limit in bounds.items()):
                    need = " and ".join(f"{BOUNDS[name][1]} {limit:g}" for name, limit in bounds.items())
                    raise UserError(f"recipe: {section.name}.{f.name} = {item}: need {need}")


def _check_data(recipe: Recipe) -> None:
    d = recipe.data
    if d.weights and len(d.weights) != len(d.sources):
        raise UserError(f"recipe: data.weights: {len(d.weights)} weights for {len(d.sources)} sources; need one each")
    if bad := [w for w in d.weights if not 0 < w < math.inf]:
        raise UserError(f"recipe: data.weights contains {bad[0]}; need finite numbers above 0. To leave a source out, "
                        "remove it")
    Filters(d.filters)  # raises
    if SELF in d.sources and recipe.student.vocab_size:
        raise UserError("recipe: student.vocab_size counts tokens in the data, but the samples of `self` are made "
                        "after that; give text with --data, or set student.vocab_size=0")
    if d.sources.count(SELF) > 1:
        raise UserError("recipe: data.sources contains `self` more than once; list it once and give it a weight")
    if SELF in d.sources and not recipe.train.tokens:
        raise UserError("recipe: data.sources contains `self`, which never ends; set a token budget with "
                        "--set train.tokens=N")


# Phase of training -> the keys of [train] that weigh its loss terms (TERMS in train/losses.py).
LOSS_WEIGHTS = {"clone": ("lm_weight", "kl_weight", "alpha"), "dense": ("lm_weight", "kl_weight", "dense_alpha")}


def _check(recipe: Recipe) -> None:
    """Check the bounds of each key, then the rules that involve several keys. Raises UserError."""
    _check_bounds(recipe)
    _check_data(recipe)
    t = recipe.train
    if recipe.export.bits_per_weight and not recipe.export.calibration_tokens:
        raise UserError(f"recipe: export.bits_per_weight = {recipe.export.bits_per_weight:g} needs calibration text to "
                        "measure the loss from each type; set export.calibration_tokens above 0")
    if recipe.student.hops and t.init == "gaussian":
        raise UserError("recipe: student.hops with train.init = 'gaussian': each student would start at random, not "
                        "from the one before; set train.init=pca, or no hops")
    if recipe.student.hops and t.dense_share < 1:
        raise UserError(f"recipe: student.hops with train.dense_share = {t.dense_share:g}: projections of the teacher "
                        "do not reach a student of a student; set train.dense_share=1, or no hops")
    if 0 < t.spike_factor <= 1:
        raise UserError(f"recipe: train.spike_factor = {t.spike_factor}: need more than 1, or 0 for no limit")
    for phase, phase_runs in (("clone", t.dense_share < 1), ("dense", t.dense_share > 0)):
        if phase_runs and not any(getattr(t, name) for name in LOSS_WEIGHTS[phase]):
            raise UserError(f"recipe: {', '.join(f'train.{name}' for name in LOSS_WEIGHTS[phase])} are all 0: "
                            "nothing to train; set one above 0")


def to_toml(recipe: Recipe) -> str:
    """Return the recipe as commented TOML that `load_recipe` reads back to the same recipe."""
    lines: list[str] = []
    for section in fields(recipe):
        table = getattr(recipe, section.name)
        lines += [*_comment(type(table).__doc__ or ""), f"[{section.name}]"]
        for f in fields(table):
            lines += [*_comment(f.metadata["help"]), f"{f.name} = {_toml_value(getattr(table, f.name))}"]
        lines.append("")
    return "\n".join(lines)


def _comment(text: str) -> list[str]:
    return textwrap.wrap(" ".join(text.split()), 100, initial_indent="# ", subsequent_indent="# ")


def _toml_value(item: Any) -> str:
    if isinstance(item, tuple):
        return "[" + ", ".join(json.dumps(part) for part in item) + "]"
    return json.dumps(item) if isinstance(item, str | bool) else str(item)
