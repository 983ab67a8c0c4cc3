"""DenseCheckpoint: a Hugging Face directory, checked when it is opened; tensors are read one at a time.

Every model is opened here (teacher, student, third-party models), so later stages can rely on names, shapes and files.
"""
from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from jinja2 import TemplateSyntaxError
from packaging.version import Version
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedTokenizerFast
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lrc_edge.config_file import (
    PROVENANCE_FILE,
    check_stop_id,
    check_tokenizer_tables,
    check_values,
    front_matter,
    ids_of,
    read_config,
    read_generation,
    read_provenance,
    read_table,
    shape_of,
)
from lrc_edge.errors import UserError, one_line, quiet_panics, shortage
from lrc_edge.families import Weight, family_of, is_unread, weights_of
from lrc_edge.shape import ModelShape

if TYPE_CHECKING:  # importing takes a second, and writing a file does not need it
    from transformers import PretrainedConfig, PreTrainedModel

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
# All files that a tokenizer may have; fold and export copy those that exist.
TOKENIZER_PARTS = (*TOKENIZER_FILES, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                   "vocab.json", "merges.txt", "chat_template.jinja")
FLOAT_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Rope:
    """Rotary embedding: base, and the scaling table (with its `rope_type`); None for plain RoPE."""

    theta: float
    scaling: dict[str, Any] | None


class DenseCheckpoint:
    """A dense decoder on disk. Build it with `open`."""

    def __init__(self, path: Path, config: dict[str, Any], shape: ModelShape, files: dict[str, Path],
                 types: dict[str, torch.dtype], name: str | None):
        self.path, self.config, self.shape = path, config, shape
        self.types = types  # weight name -> stored type
        self._files = files  # tensor name -> safetensors file
        self.generation = read_generation(path / "generation_config.json", shape)  # {} without the file
        self.card = front_matter(path / "README.md")
        self.provenance = read_provenance(path / PROVENANCE_FILE)
        self.name = self.provenance.get("name") or name or path.resolve().name

    @classmethod
    def open(cls, path: Path | str, name: str | None = None) -> DenseCheckpoint:
        """Check the JSON tables, the tensors' names, shapes and types, and that there is a tokenizer.

        Reads headers only, no weights. Raises UserError.
        """
        path = Path(path)
        config = read_config(path)
        shape = shape_of(config, path / "config.json")
        check_values(config, shape, path / "config.json")
        _check_rope_form(config, path / "config.json")
        files = _tensor_files(path)
        types = _check_tensors(shape, files, path)
        if not any((path / file).exists() for file in TOKENIZER_FILES):
            raise UserError(f"{path}: no tokenizer (looked for {' and '.join(TOKENIZER_FILES)}); "
                            "copy the model's tokenizer files there")
        check_tokenizer_tables(path)
        return cls(path, config, shape, files, types, name)

    @property
    def rope(self) -> Rope:
        return rope_of(self.config)

    @property
    def sliding_window(self) -> int | None:
        """Attention window in tokens if some layer uses one, else None."""
        return family_of(self.shape.family).window_of(self.config)

    @property
    def context_length(self) -> int:
        """Tokens up to which every runtime computes what PyTorch computes. llama.cpp has no sliding window for these
        architectures, which makes no difference up to the window's length."""
        longest = self.shape.max_position_embeddings
        return min(longest, self.sliding_window or longest)

    def weights(self) -> Iterator[Weight]:
        return weights_of(self.shape)

    def weight_files(self) -> list[Path]:
        return sorted(set(self._files.values()))

    def n_bytes(self, weight: Weight) -> int:
        """Return the bytes of the weight as stored."""
        return weight.numel * self.types[weight.name].itemsize

    def tensor(self, name: str) -> torch.Tensor:
        """Read one tensor in its stored type. Raises UserError on NaN or infinity, which no stage could fix."""
        tensor = self._read(name)
        if not all_finite(tensor):
            bad = int((~torch.isfinite(tensor)).sum())
            raise UserError(f"{self._files[name]}: {name} holds {bad} NaN or infinite values of {tensor.numel()}; "
                            "get an intact copy of the model")
        return tensor

    def rows(self, name: str, rows: Sequence[int]) -> torch.Tensor:
        """Read only these rows of a matrix: (len(rows), columns) float32, not checked for NaN."""
        with safe_open(self._files[name], framework="pt") as handle:
            view = handle.get_slice(name)
            return torch.cat([view[row:row + 1].float() for row in rows])

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer from tokenizer.json; without that file, convert tokenizer.model as transformers does.

        AutoTokenizer is avoided: the family classes of transformers 5 (LlamaTokenizer) replace parts of the file, so
        the ids would depend on the version and differ from those of runtimes that read the file. Raises UserError.
        """
        try:
            with quiet_panics():
                tokenizer = self._load_tokenizer()
                tokenizer("a", verbose=False)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # libraries raise many types here; a Rust panic is not an Exception
            if line := shortage(error):
                raise UserError(line) from error
            raise UserError(f"{self.path}: the tokenizer does not load ({one_line(error)}); "
                            "copy the model's tokenizer files again") from error
        _check_template(tokenizer, self.path)
        return tokenizer

    def _load_tokenizer(self) -> PreTrainedTokenizerBase:
        if (self.path / "tokenizer.json").exists():
            _check_subword_prefix(self.path / "tokenizer.json")
            return PreTrainedTokenizerFast.from_pretrained(self.path)
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.path)

    def stop_ids(self, tokenizer: PreTrainedTokenizerBase | None = None) -> tuple[int, ...]:
        """Return every token that ends a text or a turn, from generation_config.json, config.json and the tokenizer.

        All of them count, because config.json of chat models often names only one. Empty if none is named.
        tokenizer: this checkpoint's, if it is already loaded. Raises UserError for an id outside the vocabulary.
        """
        tokenizer = tokenizer or self.tokenizer()
        own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        for token in own:
            check_stop_id(token, self.shape.vocab_size, f"{self.path}: the tokenizer's eos_token_id")
        return tuple(dict.fromkeys([*ids_of(self.generation, "eos_token_id"), *ids_of(self.config, "eos_token_id"),
                                    *own]))

    def bos(self) -> int | None:
        """The id of the BOS token if the tokenizer writes it before a text, else None."""
        tokenizer: Any = self.tokenizer()
        return tokenizer.bos_token_id if tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id] else None

    def model(self, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        """Load the transformers model on the CPU in evaluation mode. In float32 it is the reference for every artifact.

        It is loaded in `dtype`, not cast to it, so that RoPE's frequencies stay float32.
        """
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

        config = self.check_config()
        model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        source, weights = None, None
        if set(self.types.values()) == {dtype}:
            source = self.path  # transformers maps the files
        else:  # Tensor by tensor: transformers would keep the stored tensors and the converted ones in memory.
            weights = {weight.name: self._read(weight.name).to(dtype) for weight in self.weights()}
        model = model_class.from_pretrained(source, config=config, state_dict=weights, dtype=dtype,
                                            attn_implementation="sdpa")
        return model.eval()

    def _read(self, name: str) -> torch.Tensor:
        with safe_open(self._files[name], framework="pt") as handle:  # closed at once: mapped pages count as memory
            return handle.get_tensor(name)

    def check_config(self) -> PretrainedConfig:
        """Return transformers' config. Raises UserError if it refuses a value. Imports more than `open`."""
        from transformers import AutoConfig

        try:
            return AutoConfig.from_pretrained(self.path)
        except Exception as error:  # each field has its own check, which may raise any type of error
            raise UserError(f"{self.path / 'config.json'}: transformers {transformers.__version__} refuses it "
                            f"({one_line(error)}); get an intact copy") from error


def rope_of(config: dict[str, Any]) -> Rope:
    """Read RoPE from either form of config: rope_parameters (transformers 5), or rope_theta and rope_scaling (4)."""
    table = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = table.pop("rope_theta", None) or config.get("rope_theta") or 10000.0
    kind = table.pop("type", None)
    table.setdefault("rope_type", kind or "default")
    return Rope(float(theta), None if table["rope_type"] == "default" else table)


def all_finite(tensor: torch.Tensor) -> bool:
    """Return whether a float tensor has neither NaN nor infinity. 80 times as fast as torch.isfinite (bfloat16).

    Read as integers, floats of one sign grow with their magnitude, and no finite value is above infinity. So the
    largest signed integer decides about the positive values, the largest unsigned integer about the negative ones.
    """
    if not tensor.numel():
        return True
    signed = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    infinity = torch.tensor(torch.inf, dtype=tensor.dtype).view(signed).item()
    bits = tensor.view(signed).numpy()
    unsigned = bits.view(f"u{bits.itemsize}")
    return bool(bits.max() < infinity and unsigned.max() < infinity + (1 << (8 * bits.itemsize - 1)))


def resolve_model(source: str) -> tuple[Path, str, str]:
    """Resolve a local directory or hub id to (directory, name, revision); downloads from the hub if necessary."""
    if Path(source).exists() or source.startswith(("/", ".", "~")):
        path = Path(source).expanduser()
        if not path.is_dir():
            raise UserError(f"{source}: not a directory; pass a Hugging Face model directory or a hub id")
        return path, path.resolve().name, "local"
    from huggingface_hub import snapshot_download

    try:
        path = Path(snapshot_download(source, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja",
                                                              "README.md", "LICENSE*"]))
    except Exception as error:  # offline, gated, misspelt: the hub client raises many types
        raise UserError(f"{source}: no such directory, and the hub has no such model ({one_line(error)}); "
                        "pass a local model directory or a hub id that you can download") from error
    return path, source.rsplit("/", 1)[-1], path.name


def _check_subword_prefix(file: Path) -> None:
    """Raise UserError if the tokenizers library would abort the process: it removes the prefix from the second half of
    each merge without checking that it is there."""
    if not re.search(rb'"continuing_subword_prefix"\s*:\s*"[^"]', file.read_bytes()):
        return
    model = read_table(file).get("model")
    if not isinstance(model, dict) or not (prefix := model.get("continuing_subword_prefix")):
        return
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model.get("merges") or []]
    if not all(isinstance(pair, list) and len(pair) == 2 and str(pair[1]).startswith(prefix) for pair in pairs):
        raise UserError(f"{file}: continuing_subword_prefix = {prefix!r:.40}, which not every merge has; fix the file")


def _check_template(tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Raise UserError for a chat template that is not text or not Jinja."""
    template = tokenizer.chat_template
    for text in template.values() if isinstance(template, dict) else [template] if template else []:
        if not isinstance(text, str):
            raise UserError(f"{path}: the chat template is a {type(text).__name__}, need text; fix "
                            "tokenizer_config.json")
        try:
            tokenizer.apply_chat_template([{"role": "user", "content": "a"}], chat_template=text, tokenize=False)
        except TemplateSyntaxError as error:
            raise UserError(f"{path}: the chat template is not Jinja (line {error.lineno}: {one_line(error)}); fix "
                            "chat_template.jinja, or tokenizer_config.json if there is no such file") from error
        except Exception:  # the template may refuse this conversation
            continue


def _check_rope_form(config: dict[str, Any], where: Path) -> None:
    # transformers 4.57 ignores rope_parameters and uses defaults, so teacher and student would both be wrong.
    if Version(transformers.__version__).major < 5 and "rope_parameters" in config and "rope_theta" not in config:
        raise UserError(f"{where}: only transformers >= 5 reads rope_parameters; {transformers.__version__} "
                        "would use a wrong RoPE. Install transformers >= 5")


def _tensor_files(path: Path) -> dict[str, Path]:
    """Return tensor name -> file, from the index or the single file. Opening each file checks that it is complete."""
    index, single = path / "model.safetensors.index.json", path / "model.safetensors"
    if index.exists():
        table = read_table(index)
        weight_map = table.get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise UserError(f"{index}: not a weight index (weight_map must name a file for each tensor); "
                            "get an intact copy")
        names = sorted(set(weight_map.values()))
        if outside := [name for name in names if Path(name).name != name]:
            raise UserError(f"{index}: names a file outside its directory: {outside[0]!r:.80}; get an intact copy")
        if absent := [name for name in names if name not in {file.name for file in path.iterdir()}]:
            raise UserError(f"{index}: names {absent[0]!r:.80}, which is missing; download the complete model")
        if not isinstance(table.get("metadata"), dict):
            raise UserError(f"{index}: metadata = {table.get('metadata')!r:.40}: transformers needs a table there; "
                            'write "metadata": {}')
    elif single.exists():
        names = [single.name]
    else:
        pickles = [*path.glob("*.bin"), *path.glob("*.pth"), *path.glob("*.pt")]
        if pickles:
            raise UserError(f"{path}: only pickled weights ({pickles[0].name}), which can run code when loaded; "
                            "need model.safetensors: convert the model with transformers' save_pretrained")
        raise UserError(f"{path}: no weights (looked for {single.name} and {index.name}); download the complete model")
    files: dict[str, Path] = {}
    for name in names:
        file = path / name
        try:
            with safe_open(file, framework="pt") as handle:
                files |= dict.fromkeys(handle.keys(), file)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: truncated or corrupt ({one_line(error)}; {file.stat().st_size:,} bytes); "
                            "download it again") from error
    return files


def _check_tensors(shape: ModelShape, files: dict[str, Path], path: Path) -> dict[str, torch.dtype]:
    """Check that the files contain the shape's weights; return weight name -> stored type. Raises UserError."""
    expected = {weight.name: weight.shape for weight in weights_of(shape)}
    missing = [name for name in expected if name not in files]
    if missing:
        raise UserError(f"{path}: tensor {missing[0]} is missing ({len(missing)} of {len(expected)} are); "
                        "config.json and the weights disagree: get an intact copy")
    # Some tied checkpoints also store the head, and old ones store RoPE's frequencies. Both are redundant.
    extra = [name for name in files if name not in expected and not is_unread(name)]
    if extra:
        raise UserError(f"{path}: tensor {extra[0]} does not belong to a {shape.family} ({len(extra)} such); "
                        "an adapter or a changed architecture is not supported")
    types: dict[str, torch.dtype] = {}
    for file in sorted(set(files.values())):
        with safe_open(file, framework="pt") as handle:
            for name in handle.keys():
                if name not in expected:
                    continue
                view = handle.get_slice(name)
                if tuple(view.get_shape()) != expected[name]:
                    raise UserError(f"{file}: {name} has shape {list(view.get_shape())}, config.json implies "
                                    f"{list(expected[name])}; get a config and weights of the same model")
                if view.get_dtype() not in FLOAT_TYPES:
                    raise UserError(f"{file}: {name} has type {view.get_dtype()}, need one of "
                                    f"{', '.join(FLOAT_TYPES)}; pass the unquantized model")
                types[name] = FLOAT_TYPES[view.get_dtype()]
    return types
