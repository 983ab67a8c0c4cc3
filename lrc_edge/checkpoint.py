"""DenseCheckpoint: a Hugging Face directory, checked when it is opened, its tensors read one at a time.

Teacher, student and any foreign model come through this door, so every later stage may trust names, shapes and files.
"""
from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
import yaml
from packaging.version import Version
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedTokenizerFast
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lrc_edge.config_file import PROVENANCE_FILE, read_config, shape_of
from lrc_edge.errors import UserError
from lrc_edge.roles import HEAD, Weight, weights_of
from lrc_edge.shape import ModelShape

if TYPE_CHECKING:  # a second's import, which writing a file does not need
    from transformers import PreTrainedModel

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
# What a tokenizer may consist of; a fold and an export carry those that exist.
TOKENIZER_PARTS = (*TOKENIZER_FILES, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                   "vocab.json", "merges.txt", "chat_template.jinja")
FLOAT_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Rope:
    """Rotary embedding: base, and the scaling table (its `rope_type` inside) when it is not the plain kind."""

    theta: float
    scaling: dict[str, Any] | None


class DenseCheckpoint:
    """A dense decoder on disk. Build it with `open`."""

    def __init__(self, path: Path, config: dict[str, Any], shape: ModelShape, files: dict[str, Path],
                 types: dict[str, torch.dtype], name: str):
        self.path, self.config, self.shape, self.name = path, config, shape, name
        self.types = types  # weight name -> stored type
        self._files = files  # tensor name -> safetensors file
        self.card = _front_matter(path / "README.md")
        provenance = path / PROVENANCE_FILE
        self.provenance: dict[str, str] = json.loads(provenance.read_text()) if provenance.exists() else {}

    @classmethod
    def open(cls, path: Path | str, name: str | None = None) -> DenseCheckpoint:
        """Check the directory's config, tensor names, shapes and types, and its tokenizer's presence.

        Reads headers only, no weights. Raises UserError.
        """
        path = Path(path)
        config = read_config(path)
        shape = shape_of(config, path / "config.json")
        _check_rope_form(config, path / "config.json")
        files = _tensor_files(path)
        types = _check_tensors(shape, files, path)
        if not any((path / file).exists() for file in TOKENIZER_FILES):
            raise UserError(f"{path}: no tokenizer (looked for {' and '.join(TOKENIZER_FILES)}); "
                            "copy the model's tokenizer files there")
        return cls(path, config, shape, files, types, _recorded_name(path) or name or path.resolve().name)

    @property
    def rope(self) -> Rope:
        """From either config form: rope_parameters (transformers 5) or rope_theta and rope_scaling (4.x)."""
        table = dict(self.config.get("rope_parameters") or self.config.get("rope_scaling") or {})
        theta = table.pop("rope_theta", None) or self.config.get("rope_theta") or 10000.0
        kind = table.pop("type", None)
        table.setdefault("rope_type", kind or "default")
        return Rope(float(theta), None if table["rope_type"] == "default" else table)

    @property
    def sliding_window(self) -> int | None:
        """Attention window in tokens when some layer uses one, else None."""
        if self.shape.family == "mistral":
            return self.config.get("sliding_window", 4096)  # transformers' default, should the field be missing
        return self.config.get("sliding_window") if self.config.get("use_sliding_window") else None

    def weights(self) -> Iterator[Weight]:
        return weights_of(self.shape)

    def weight_files(self) -> list[Path]:
        return sorted(set(self._files.values()))

    def n_bytes(self, weight: Weight) -> int:
        """Of the weight as it is stored."""
        return weight.numel * self.types[weight.name].itemsize

    def tensor(self, name: str) -> torch.Tensor:
        """Read one tensor in its stored type. Raises UserError on NaN or infinity, which no stage could mend."""
        tensor = self._read(name)
        if not all_finite(tensor):
            bad = int((~torch.isfinite(tensor)).sum())
            raise UserError(f"{self._files[name]}: {name} holds {bad} NaN or infinite values of {tensor.numel()}; "
                            "get an intact copy of the model")
        return tensor

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer as tokenizer.json says it; without that file, as transformers converts tokenizer.model.

        Not through AutoTokenizer: transformers 5's family classes (LlamaTokenizer) replace parts of the file by their
        own, so that ids depend on the version and no runtime that reads the file can agree.
        """
        try:
            if (self.path / "tokenizer.json").exists():
                return PreTrainedTokenizerFast.from_pretrained(self.path)
            from transformers import AutoTokenizer

            return AutoTokenizer.from_pretrained(self.path)
        except Exception as error:  # the libraries raise many types for a broken file
            raise UserError(f"{self.path}: the tokenizer does not load ({_one_line(error)}); "
                            "copy the model's tokenizer files again") from error

    def model(self, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        """The transformers model on the CPU, in evaluation mode; in float32, every artifact is judged against it.

        Loaded in `dtype` and not cast to it, RoPE's frequencies stay float32.
        """
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

        config = AutoConfig.from_pretrained(self.path)
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        source, weights = None, None
        if set(self.types.values()) == {dtype}:
            source = self.path  # transformers maps the files
        else:  # Tensor by tensor: transformers would hold all that is stored next to all that it has converted.
            weights = {weight.name: self._read(weight.name).to(dtype) for weight in self.weights()}
        model = model_class.from_pretrained(source, config=config, state_dict=weights, dtype=dtype,
                                            attn_implementation="sdpa")
        return model.eval()

    def _read(self, name: str) -> torch.Tensor:
        with safe_open(self._files[name], framework="pt") as handle:  # closed again: pages that were read count as used
            return handle.get_tensor(name)


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether a floating-point tensor holds neither NaN nor infinity; 80 times as fast as torch.isfinite (bfloat16).

    Read as integers, floats of one sign grow with their magnitude, and nothing finite comes after infinity: the
    largest signed integer judges the positive values, the largest unsigned one the negative values.
    """
    if not tensor.numel():
        return True
    signed = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    infinity = torch.tensor(torch.inf, dtype=tensor.dtype).view(signed).item()
    bits = tensor.view(signed).numpy()
    unsigned = bits.view(f"u{bits.itemsize}")
    return bool(bits.max() < infinity and unsigned.max() < infinity + (1 << (8 * bits.itemsize - 1)))


def resolve_model(source: str) -> tuple[Path, str, str]:
    """A local directory or hub id -> (directory, name, revision). Downloads from the hub when there is no directory."""
    if Path(source).exists() or source.startswith(("/", ".", "~")):
        path = Path(source).expanduser()
        if not path.is_dir():
            raise UserError(f"{source}: not a directory; give a Hugging Face model directory or a hub id")
        return path, path.resolve().name, "local"
    from huggingface_hub import snapshot_download

    try:
        path = Path(snapshot_download(source, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja",
                                                              "README.md", "LICENSE*"]))
    except Exception as error:  # offline, gated, misspelt: the hub client raises many types
        raise UserError(f"{source}: no such directory, and the hub did not give it ({_one_line(error)}); "
                        "give a local model directory or a hub id that you can download") from error
    return path, source.rsplit("/", 1)[-1], path.name


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _front_matter(readme: Path) -> dict[str, Any]:
    """The YAML block at the top of a model card; {} when there is none or it is not YAML."""
    if not readme.exists():
        return {}
    parts = readme.read_text(errors="replace").split("---\n", 2)
    if len(parts) < 3 or parts[0].strip():
        return {}
    try:
        table = yaml.safe_load(parts[1])
    except yaml.YAMLError:
        return {}
    return table if isinstance(table, dict) else {}


def _recorded_name(path: Path) -> str | None:
    file = path / PROVENANCE_FILE
    return json.loads(file.read_text()).get("name") if file.exists() else None


def _check_rope_form(config: dict[str, Any], where: Path) -> None:
    # 4.57 does not read rope_parameters and silently takes its defaults, so teacher and student would both be wrong.
    if Version(transformers.__version__).major < 5 and "rope_parameters" in config and "rope_theta" not in config:
        raise UserError(f"{where}: rope_parameters is read by transformers >= 5 only, and this is "
                        f"{transformers.__version__}, which would use a wrong RoPE; install transformers >= 5")


def _tensor_files(path: Path) -> dict[str, Path]:
    """Tensor name -> file, from the index or the single file. Opens every file, which checks that it is whole."""
    index, single = path / "model.safetensors.index.json", path / "model.safetensors"
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise UserError(f"{index}: not a weight index ({error!r}); get an intact copy") from error
        if outside := [name for name in names if Path(name).name != name]:
            raise UserError(f"{index}: names a file outside its directory: {outside[0]!r}; get an intact copy")
    elif single.exists():
        names = [single.name]
    else:
        pickles = [*path.glob("*.bin"), *path.glob("*.pth"), *path.glob("*.pt")]
        if pickles:
            raise UserError(f"{path}: only pickled weights ({pickles[0].name}), which can run code when loaded; "
                            "need model.safetensors: convert the model with transformers' save_pretrained")
        raise UserError(f"{path}: no weights (looked for {single.name} and {index.name}); get the whole model")
    files: dict[str, Path] = {}
    for name in names:
        file = path / name
        if not file.exists():
            raise UserError(f"{file}: missing, though {index.name} names it; get the whole model")
        try:
            with safe_open(file, framework="pt") as handle:
                files |= dict.fromkeys(handle.keys(), file)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: truncated or corrupt ({_one_line(error)}; {file.stat().st_size:,} bytes); "
                            "download it again") from error
    return files


def _check_tensors(shape: ModelShape, files: dict[str, Path], path: Path) -> dict[str, torch.dtype]:
    """Raise UserError unless the files hold the shape's weights. Returns weight name -> stored type."""
    expected = {weight.name: weight.shape for weight in weights_of(shape)}
    missing = [name for name in expected if name not in files]
    if missing:
        raise UserError(f"{path}: tensor {missing[0]} is missing ({len(missing)} of {len(expected)} are); "
                        "config.json and the weights disagree: get an intact copy")
    # Some tied checkpoints store the head as well; old ones store RoPE's frequencies. Neither is a weight of its own.
    extra = [name for name in files if name not in expected and name != HEAD.weight and "rotary_emb" not in name]
    if extra:
        raise UserError(f"{path}: tensor {extra[0]} is not one of a {shape.family} ({len(extra)} such); "
                        "an adapter or a changed architecture is not supported")
    types: dict[str, torch.dtype] = {}
    for file in sorted(set(files.values())):
        with safe_open(file, framework="pt") as handle:
            for name in handle.keys():
                if name not in expected:
                    continue
                view = handle.get_slice(name)
                if tuple(view.get_shape()) != expected[name]:
                    raise UserError(f"{file}: {name} has shape {list(view.get_shape())}, config.json says "
                                    f"{list(expected[name])}; get a config and weights that belong together")
                if view.get_dtype() not in FLOAT_TYPES:
                    raise UserError(f"{file}: {name} has type {view.get_dtype()}, need one of "
                                    f"{', '.join(FLOAT_TYPES)}; give the unquantized model")
                types[name] = FLOAT_TYPES[view.get_dtype()]
    return types
