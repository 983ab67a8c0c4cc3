"""Write GGUF files from a DenseCheckpoint.

F32, F16 and BF16 are written here, with one tensor in memory at a time. llama.cpp's quantizer makes every other type
from such a file.
"""
from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from gguf import (
    GGML_QUANT_SIZES,
    MODEL_TENSOR,
    TENSOR_NAMES,
    GGMLQuantizationType,
    GGUFReader,
    GGUFWriter,
    quants,
)

from lrc_edge.artifact import Artifact, HashedFile, sha256_of
from lrc_edge.checkpoint import DenseCheckpoint, all_finite
from lrc_edge.console import QUIET, Listener
from lrc_edge.errors import UserError
from lrc_edge.export.gguf.metadata import (
    architecture,
    check_rope,
    llama3_rope_factors,
    model_size,
    write_metadata,
)
from lrc_edge.export.gguf.modelfile import write_modelfile
from lrc_edge.export.gguf.vocabulary import Vocabulary, check_tokenizer, read_vocabulary
from lrc_edge.export.passes import Passes
from lrc_edge.export.quantize.encodings import (
    ENCODINGS,
    Encoding,
    check_imatrix,
    parse_encoding,
    quantize_file,
    read_contents,
)
from lrc_edge.export.quantize.imatrix import check_importance, measured_weights
from lrc_edge.export.quantize.mixed_precision import Allocation
from lrc_edge.families import Weight
from lrc_edge.formats import FORMATS, mixed_encoding
from lrc_edge.gguf_names import gguf_name

_TORCH_TYPES = {GGMLQuantizationType.F32: torch.float32, GGMLQuantizationType.F16: torch.float16,
                GGMLQuantizationType.BF16: torch.bfloat16}
PART = 1 << 22  # elements that are written at once
PIECE = 1 << 15  # elements that are converted at once; torch starts threads above that
ROPE_FACTORS = TENSOR_NAMES[MODEL_TENSOR.ROPE_FREQS] + ".weight"


def export_gguf(checkpoint: DenseCheckpoint, folder: Path, encodings: Sequence[str],
                progress: Listener = QUIET, importance: Mapping[str, np.ndarray] | None = None, *,
                n_chunks: int | None = None, on_grid: DenseCheckpoint | None = None,
                allocation: Allocation | None = None) -> list[Artifact]:
    """Write one GGUF file for each encoding, and an Ollama Modelfile, into `folder`.

    `importance`: imatrix.collect's, by weight name, and `n_chunks` the number of rows behind it. `on_grid`: the same
    model after QAT, which is the source of q4_0. `allocation`: one more file, in mixed precision.
    Returns the artifacts in this order, their paths relative to folder's parent. A file gets its name only when it
    is complete. Raises UserError before writing if GGUF cannot represent an encoding, the tokenizer or RoPE.
    """
    wanted = list(dict.fromkeys(parse_encoding(name) for name in encodings))
    if allocation is not None:
        wanted.append(_mixed_encoding(checkpoint, allocation))
    for encoding in wanted:
        check_imatrix(encoding, importance is not None)
    by_tensor = None if importance is None else _by_tensor(checkpoint, importance)
    check_gguf(checkpoint)
    vocabulary = read_vocabulary(checkpoint)
    folder.mkdir(parents=True, exist_ok=True)
    files = {encoding: folder / file_name(checkpoint, encoding) for encoding in wanted}
    quantized = {encoding: file for encoding, file in files.items() if not encoding.direct}
    from_grid = {encoding: quantized.pop(encoding) for encoding in files
                 if on_grid is not None and encoding.trained_on_grid}
    passes = _passes(checkpoint, files, len(from_grid), progress)
    hashes: dict[Encoding, str] = {}
    for encoding, file in files.items():
        if encoding.direct:
            with _whole(file) as partial:
                passes.start(f"writing {file.name}")
                hashes[encoding] = _write(checkpoint, vocabulary, encoding, partial, passes)
    if on_grid is not None and from_grid:
        with _lossless_file(on_grid, vocabulary, {}, folder, passes) as source:
            # Without importance: the scales are already those that the weights were trained with.
            _quantize(source, from_grid, passes)
    if quantized:
        with _lossless_file(checkpoint, vocabulary, files, folder, passes) as source:
            _quantize(source, quantized, passes, by_tensor, n_chunks)
    artifacts = [_artifact(checkpoint, encoding, file, hashes.get(encoding) or sha256_of(file),
                           identical_blocks(file, on_grid) if on_grid and encoding in from_grid else None)
                 for encoding, file in files.items()]
    if files:
        write_modelfile(checkpoint, vocabulary, {encoding.name: file for encoding, file in files.items()})
    return artifacts


def _quantize(source: Path, files: Mapping[Encoding, Path], passes: Passes,
              importance: Mapping[str, np.ndarray] | None = None, n_chunks: int | None = None) -> None:
    for encoding, file in files.items():
        with _whole(file) as partial:
            passes.start(f"quantizing {file.name}")
            quantize_file(source, partial, encoding, importance=importance, n_chunks=n_chunks, progress=passes.at)


def _passes(checkpoint: DenseCheckpoint, files: dict[Encoding, Path], n_from_grid: int, progress: Listener) -> Passes:
    """Count one pass for each file, and one for each temporary file that llama.cpp quantizes."""
    n_quantized = sum(not encoding.direct for encoding in files) - n_from_grid
    n_temporary = n_from_grid + (n_quantized > 0 and not any(encoding in files for encoding in _lossless(checkpoint)))
    n_bytes = {gguf_name(weight): checkpoint.n_bytes(weight) for weight in checkpoint.weights()}
    return Passes(n_bytes, len(files) + n_temporary, progress)


def identical_blocks(file: Path, checkpoint: DenseCheckpoint) -> float:
    """Return the share of the file's quantized blocks that decode to exactly the checkpoint's weights."""
    tensors = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    permuted = architecture(checkpoint).permutes_qk
    n_blocks = n_identical = 0
    for weight in checkpoint.weights():
        tensor = tensors[gguf_name(weight)]
        block = GGML_QUANT_SIZES[tensor.tensor_type][0]
        if block > 1:
            expected = _stored(_in_order(checkpoint, weight, permuted), GGMLQuantizationType.F32, weight.name)
            equal = (quants.dequantize(tensor.data, tensor.tensor_type) == expected).reshape(-1, block).all(1)
            n_blocks, n_identical = n_blocks + equal.size, n_identical + int(equal.sum())
    return n_identical / n_blocks


def _by_tensor(checkpoint: DenseCheckpoint, importance: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the importance by GGUF tensor name."""
    check_importance(checkpoint, importance)
    return {gguf_name(weight): importance[weight.name] for weight in measured_weights(checkpoint)}


def _mixed_encoding(checkpoint: DenseCheckpoint, allocation: Allocation) -> Encoding:
    """Return the allocation as an encoding. Its general.file_type is that of the most frequent type."""
    nominal = next(encoding for encoding in ENCODINGS.values() if encoding.type == allocation.main_type)
    types = tuple((gguf_name(weight), allocation.types[weight.name]) for weight in checkpoint.weights()
                  if len(weight.shape) > 1)
    return Encoding(mixed_encoding(allocation.bits_per_weight), nominal.ftype, nominal.type, needs_imatrix=False,
                    tensor_types=types)


def rope_factor_bytes(checkpoint: DenseCheckpoint) -> int:
    """Bytes of RoPE's frequency factors, the one tensor that is not a weight; 0 for most models."""
    factors = llama3_rope_factors(checkpoint)
    return 0 if factors is None else factors.numel() * 4


def check_gguf(checkpoint: DenseCheckpoint) -> None:
    """Raise UserError when llama.cpp cannot run the checkpoint, or a student of it. Takes seconds; call it early."""
    architecture(checkpoint)
    check_rope(checkpoint)
    check_tokenizer(checkpoint)


def file_name(checkpoint: DenseCheckpoint, encoding: Encoding) -> str:
    """Return the file name by llama.cpp's convention: <Name>-<Size>-<Encoding>.gguf."""
    template = f"{{model}}-{encoding.name}.gguf" if encoding.tensor_types else FORMATS[f"gguf:{encoding.name}"].file
    return template.format(model=file_stem(checkpoint))


def file_stem(checkpoint: DenseCheckpoint) -> str:
    """Return <Name>-<Size>, or <Name> if it already contains the size."""
    name = re.sub(r"[^\w.-]+", "-", checkpoint.name, flags=re.ASCII).strip("-.") or "model"
    stated = [float(number) * {"K": 1e3, "M": 1e6, "B": 1e9}[unit.upper()]
              for number, unit in re.findall(r"(?<![^-_])(\d+(?:\.\d+)?)([KMB])(?![^-_])", name, re.IGNORECASE)]
    n_params = checkpoint.shape.n_params
    size = "" if any(abs(n - n_params) <= n_params / 4 for n in stated) else f"-{model_size(checkpoint)}"
    return name + size


@contextmanager
def _whole(file: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder. It is renamed to `file` if the block succeeds, else removed."""
    partial = file.with_name(f".{file.name}.partial")
    try:
        yield partial
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def _lossless_file(checkpoint: DenseCheckpoint, vocabulary: Vocabulary, files: dict[Encoding, Path],
                   folder: Path, passes: Passes) -> Iterator[Path]:
    """Yield a GGUF with exactly the checkpoint's weights: one of `files` if possible, else a temporary file."""
    stored, _ = _lossless(checkpoint)
    for encoding in _lossless(checkpoint):
        if encoding in files:
            yield files[encoding]
            return
    temporary = folder / f".{file_name(checkpoint, stored)}.source"
    try:
        passes.start(f"writing {stored.name} to quantize")
        _write(checkpoint, vocabulary, stored, temporary, passes)
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _lossless(checkpoint: DenseCheckpoint) -> tuple[Encoding, Encoding]:
    """Return the encodings that store the checkpoint exactly: f32, and bf16 or f16 if all matrices have that type."""
    types = {checkpoint.types[weight.name] for weight in checkpoint.weights() if len(weight.shape) > 1}
    stored = {frozenset({torch.bfloat16}): "bf16", frozenset({torch.float16}): "f16"}.get(frozenset(types), "f32")
    return ENCODINGS[stored], ENCODINGS["f32"]


def _write(checkpoint: DenseCheckpoint, vocabulary: Vocabulary, encoding: Encoding, path: Path, passes: Passes) -> str:
    """Write an F32, F16 or BF16 file and return its hash. Vectors (norms, biases) stay F32, as llama.cpp requires."""
    writer = GGUFWriter(path, architecture(checkpoint).name)
    write_metadata(writer, checkpoint, vocabulary, encoding)
    weights = list(checkpoint.weights())
    for weight in weights:
        kind = _tensor_type(weight, encoding)
        n_bytes = weight.numel * _TORCH_TYPES[kind].itemsize
        writer.add_tensor_info(gguf_name(weight), weight.shape, np.dtype(np.float32), n_bytes, raw_dtype=kind)
    factors = llama3_rope_factors(checkpoint)
    if factors is not None:
        writer.add_tensor_info(ROPE_FACTORS, factors.shape, np.dtype(np.float32), factors.numel() * 4)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()
    permuted = architecture(checkpoint).permutes_qk
    with HashedFile(path) as file:
        for weight in weights:
            passes.at(gguf_name(weight))
            file.align(writer.data_alignment)
            for part in _in_order(checkpoint, weight, permuted).reshape(-1).split(PART):
                file.write(_stored(part, _tensor_type(weight, encoding), f"{checkpoint.path}: {weight.name}"))
        if factors is not None:
            file.align(writer.data_alignment)
            file.write(factors.numpy())
        file.align(writer.data_alignment)
        return file.sha256()


def _tensor_type(weight: Weight, encoding: Encoding) -> GGMLQuantizationType:
    return encoding.type if len(weight.shape) > 1 else GGMLQuantizationType.F32


def _in_order(checkpoint: DenseCheckpoint, weight: Weight, permuted: bool) -> torch.Tensor:
    """Return the weight with its rows in the order of llama.cpp's graph."""
    tensor, shape = checkpoint.tensor(weight.name), checkpoint.shape
    if permuted and weight.role.name in ("attn_q", "attn_q_bias"):
        return interleave_rotary(tensor, shape.num_attention_heads)
    if permuted and weight.role.name in ("attn_k", "attn_k_bias"):
        return interleave_rotary(tensor, shape.num_key_value_heads)
    return tensor


def _stored(tensor: torch.Tensor, kind: GGMLQuantizationType, where: str) -> np.ndarray:
    """Return the tensor as GGUF stores it; BF16 as its bits in int16, since numpy has no such type."""
    tensor = _converted(tensor, _TORCH_TYPES[kind])
    if kind == GGMLQuantizationType.F16 and not all_finite(tensor):
        raise UserError(f"{where} has values beyond F16's largest, 65504; use bf16 or f32 instead of f16")
    return tensor.view(torch.int16).numpy() if kind == GGMLQuantizationType.BF16 else tensor.numpy()


def _converted(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the contiguous tensor in another type.

    It is converted through float32 in pieces that stay in the cache and on this thread. That takes half the time of one
    call, whose threads would compete with those of HashedFile.
    """
    if tensor.dtype == dtype:
        return tensor.contiguous()
    made = torch.empty(tensor.shape, dtype=dtype)
    for source, target in zip(tensor.reshape(-1).split(PIECE), made.view(-1).split(PIECE), strict=True):
        target.copy_(source.float())
    return made


def interleave_rotary(tensor: torch.Tensor, n_heads: int) -> torch.Tensor:
    """Reorder the rows of q or k for llama.cpp's llama graph.

    Hugging Face rotates row i of a head with row i + head_dim/2; that graph rotates row 2i with row 2i + 1.
    (n_heads * head_dim, ...) -> the same shape.
    """
    halves = tensor.reshape(n_heads, 2, -1, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


def _artifact(checkpoint: DenseCheckpoint, encoding: Encoding, file: Path, sha256: str,
              identical: float | None) -> Artifact:
    contents = read_contents(file, encoding)
    if encoding.tensor_types and contents.fallbacks:  # candidates() offers what every row can have
        raise RuntimeError(f"{file.name}: llama.cpp did not keep to the allocation: {contents.fallbacks}")
    return Artifact(
        path=f"{file.parent.name}/{file.name}", format="gguf", encoding=encoding.name, bytes=file.stat().st_size,
        bits_per_weight=8 * contents.data_bytes / checkpoint.shape.n_params, sha256=sha256,
        fallbacks=contents.fallbacks, tensor_types=contents.tensor_types, identical_blocks=identical)
