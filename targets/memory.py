"""Predict from its shape alone how much memory a model needs in a runtime.

llama.cpp's part is derived from its source (0.5.0, as in llama-cpp-python 0.3.36), onnxruntime's (1.31) from
measurements; benchmarks/fit.py compares both with the resident sets of real processes. The additional memory of node
and browsers is fitted to two or three measurements each (node 20, headless Chromium 156). The prompt is assumed to
fill the context.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

from lrc_edge.errors import UserError
from lrc_edge.families import EMBEDDING, HEAD, Weight, weights_of
from lrc_edge.formats import BLOCK, format_of
from lrc_edge.shape import ModelShape
from lrc_edge.targets.runtimes.table import readers_of

GROUPS = ("embedding", "attention", "ffn", "norms", "head")
# A matrix row that is not a multiple of the format's block: llama.cpp stores the matrix as F16, ONNX pads the row.
_PADS = {"gguf": False, "onnx": True}
_PRODUCT_BYTES = {"F16": 2, "Q4_0": 34 / 32, "Q8_0": 34 / 32}  # type of a matrix -> bytes per input of its product
_BATCH = 512  # llama.cpp's n_ubatch, and wllama's
_CONTEXT_STEP = 256  # llama.cpp rounds the context up to this (llama_context's constructor)
# Plain onnxruntime keeps a step's complete new cache next to the previous one, and its arena has holes of older ones:
# 1.47 to 1.48 times the cache where the cache is nearly everything. Part of it goes where the prompt's activations
# were; how much depends on how the arena was split. Both factors are fitted: 20 points were within 10 %.
_GROWING_CACHE, _USED_AGAIN = 1.5, 0.8
# How many times more weights, caches and logits a page holds: old ones stay in JavaScript until they are collected.
_PAGE_WEIGHTS, _PAGE_CACHE, _PAGE_LOGITS = 0.9, 2.6, 2.5


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak, by purpose."""

    weights: int  # as they are in the file
    copies: int  # of weights, repacked for the runtime's kernels
    kv_cache: int
    working: int  # activations, logits, scratch
    # The part of `weights` that is mapped from the file and not read again once copied. It counts in the resident set,
    # but the system can drop it when it needs the room.
    droppable: int = 0
    runtime: int = 0  # the program itself and its vocabulary

    @property
    def peak(self) -> int:
        """The largest resident set (Linux: VmHWM); in a browser the tab's heap."""
        return self.weights + self.copies + self.kv_cache + self.working + self.runtime

    @property
    def needed(self) -> int:
        return self.peak - self.droppable


def weight_bytes(weight: Weight, format_: str) -> int:
    """Return the bytes of one tensor in a file of that format, one of profile.PROFILE_FORMATS. Vectors are float32."""
    if len(weight.shape) < 2:
        return 4 * weight.numel
    file, rows, length = format_of(format_), math.prod(weight.shape[:-1]), weight.shape[-1]
    if length % file.block and not _PADS[file.kind]:
        return 2 * weight.numel
    return rows * math.ceil(length / file.block) * file.block_bytes[weight.role in (EMBEDDING, HEAD)]


def bytes_by_group(shape: ModelShape, format_: str) -> dict[str, int]:
    """Return group -> bytes in a file of that format, all layers together; a tied head has none."""
    groups = dict.fromkeys(GROUPS, 0)
    for weight in weights_of(shape):
        groups[_group(weight)] += weight_bytes(weight, format_)
    return groups


def _group(weight: Weight) -> str:
    if weight.role is EMBEDDING:
        return "embedding"
    if weight.role is HEAD:
        return "head"
    if "norm" in weight.role.name:
        return "norms"
    return weight.role.name.split("_")[0].replace("attn", "attention")


def kv_bytes_per_token(shape: ModelShape, format_: str, cache: str = "f16") -> int:
    """Return the bytes per token of the KV cache. `cache`: its type in llama.cpp. Our ONNX graphs use float32."""
    element_bytes = {"gguf": format_of(f"gguf:{cache}").bytes_per_weight, "onnx": 4.0}
    return int(element_bytes[format_of(format_).kind] * shape.kv_elements_per_token)


def memory_of(shape: ModelShape, format_: str, runtime: str, context: int, features: Collection[str],
              cache: str = "f16") -> Memory:
    """Predict the memory of `runtime` for a file of that format when a prompt fills `context`.

    features: the processor's, as profiles name them. cache: the type of llama.cpp's KV cache. Raises UserError for an
    unknown format or runtime, and for a runtime that does not read the format.
    """
    if runtime not in _PREDICTIONS:
        raise UserError(f"runtime {runtime!r}: its memory is unknown; known: {', '.join(_PREDICTIONS)}")
    if runtime not in (readers := readers_of(format_of(format_).kind)):
        raise UserError(f"{format_} in {runtime}: only {', '.join(readers)} read it")
    own = _PREDICTIONS[runtime]
    return replace(own.predict(_Case(shape, format_, context, features, cache)),
                   runtime=own.process_bytes + own.token_bytes * shape.vocab_size)


@dataclass(frozen=True)
class _Case:
    """The arguments of memory_of."""

    shape: ModelShape
    format: str
    context: int
    features: Collection[str]
    cache: str


# llama.cpp


def _llama_cpp(case: _Case) -> Memory:
    shape = case.shape
    padded = math.ceil(case.context / _CONTEXT_STEP) * _CONTEXT_STEP
    repacked, originals = _repacked(shape, case.format, case.features)
    return Memory(
        weights=sum(bytes_by_group(shape, case.format).values()), copies=repacked, droppable=originals,
        working=_llama_cpp_activations(shape, case.format, case.context, padded),
        kv_cache=padded * kv_bytes_per_token(shape, case.format, case.cache))


def _wllama(case: _Case) -> Memory:
    """llama.cpp in a 32-bit address space, where reserved memory counts even if it is never touched."""
    memory, shape = _llama_cpp(case), case.shape
    reserved = 4 * min(_BATCH, case.context) * (shape.vocab_size + 2 * shape.hidden_size)
    return replace(memory, working=max(memory.working, reserved))


def _repacked(shape: ModelShape, format_: str, features: Collection[str]) -> tuple[int, int]:
    """Return the bytes of the matrices that llama.cpp repacks, and the bytes of those whose original is not read again.

    llama.cpp repacks matrices into interleaved rows when it loads them. The original of a tied head is read again, as
    the embedding. Source: ggml_repack_get_optimal_repack_type in ggml-cpu.
    """
    file, dotprod = format_of(format_), "dotprod" in features or "i8mm" in features
    # Type -> rows that are interleaved.
    rows_of = {"Q4_0": 8 if "avx2" in features else 4 if dotprod else 0, "Q8_0": 4 if dotprod else 0}
    copied = originals = 0
    for weight in weights_of(shape):
        is_embedding = weight.role is EMBEDDING
        if len(weight.shape) < 2 or weight.shape[1] % BLOCK or (is_embedding and not shape.tied):
            continue
        step = rows_of.get(str(file.ends if weight.role in (EMBEDDING, HEAD) else file.type), 0)
        if step and weight.shape[0] % step == 0:
            copied += weight_bytes(weight, format_)
            originals += 0 if is_embedding else weight_bytes(weight, format_)
    return copied, originals


def _llama_cpp_activations(shape: ModelShape, format_: str, context: int, padded: int) -> int:
    """Return the bytes of the touched part of the compute buffer, the work buffer, and the logits of one token.

    The compute buffer holds the mask (T x context, F16), the residual stream, its norm and two more rows of their size
    where the allocator leaves holes, and either gate, up and their product, or query, attended query, key and value.
    (With logits of one token it is larger than what it uses: T x vocabulary, which only `score` touches.) The work
    buffer holds a matrix product's input in the type of its kernel.
    """
    tokens = min(_BATCH, context)
    mask = 2 * tokens * padded
    rows = 4 * tokens * (4 * shape.hidden_size + max(3 * shape.intermediate_size, 2 * (shape.q_size + shape.kv_size)))
    widest = max(shape.hidden_size, shape.intermediate_size, shape.q_size)
    work = tokens * widest * _PRODUCT_BYTES[format_of(format_).type]
    return mask + rows + int(work) + 4 * shape.vocab_size


# onnxruntime


def _onnxruntime_genai(case: _Case) -> Memory:
    """onnxruntime-genai: the prompt is read in one pass, with logits for every position.

    onnxruntime's planner lets values of the same shape share a buffer: residual, norm and two outputs; queries,
    rotated, attended; keys and values, rotated and in the order of heads; gate, silu, up; and the widest product's
    input as int8 with its scales.
    """
    shape = case.shape
    widths = (4 * shape.hidden_size + 3 * shape.q_size + 5 * shape.kv_size + 3 * shape.intermediate_size
              + 0.3 * max(shape.hidden_size, shape.q_size, shape.intermediate_size))
    rope_tables = 4 * shape.max_position_embeddings * shape.head_dim
    return Memory(
        weights=sum(bytes_by_group(shape, case.format).values()) + rope_tables, copies=_prepacked(shape),
        kv_cache=case.context * kv_bytes_per_token(shape, case.format),
        working=int(4 * case.context * widths) + 4 * case.context * shape.vocab_size)


def _onnxruntime(case: _Case) -> Memory:
    """onnxruntime: in decoding, the new cache of a step exists next to the previous one."""
    memory = _onnxruntime_genai(case)
    more = max(0, int(_GROWING_CACHE * memory.kv_cache - _USED_AGAIN * memory.working))
    return replace(memory, working=memory.working + more)


def _transformers_js(case: _Case) -> Memory:
    """transformers.js: the file stays in JavaScript next to the module's copy, as do old caches and logits."""
    memory, logits = _onnxruntime_genai(case), 4 * case.context * case.shape.vocab_size
    return replace(memory, copies=int(_PAGE_WEIGHTS * memory.weights),
                   working=memory.working + int(_PAGE_CACHE * memory.kv_cache + _PAGE_LOGITS * logits))


def _prepacked(shape: ModelShape) -> int:
    """Return the bytes that MatMulNBits adds when it repacks a matrix: 8 bytes per block (scale and sum).

    The file's levels are released, except those of a tied head, which are also the embedding's.
    """
    copies = 0
    for weight in weights_of(shape):
        if len(weight.shape) == 2 and (weight.role is not EMBEDDING or shape.tied):
            blocks = weight.shape[0] * math.ceil(weight.shape[1] / BLOCK)
            copies += blocks * (8 + BLOCK * (weight.role is EMBEDDING))
    return copies


@dataclass(frozen=True)
class _Prediction:
    """process_bytes: of the process without a model (VmHWM, Linux x86-64): Python with numpy, node or a
    browser's page; a program in C++ takes less than Python. token_bytes: per token of the vocabulary (strings, ids,
    merges).
    """

    predict: Callable[[_Case], Memory]
    process_bytes: int
    token_bytes: int


# By the name of the runtime. llama.cpp's 340 bytes per token: measured with real vocabularies, 318 (Qwen2) to 424
# (Llama 3) for BPE; 152 for SentencePiece, which are small. node reads the file's metadata into JavaScript as well.
# Plain onnxruntime has no tokenizer.
_PREDICTIONS = {
    "llama.cpp": _Prediction(_llama_cpp, 47_000_000, 340),
    "node-llama-cpp": _Prediction(_llama_cpp, 98_000_000, 840),
    "wllama": _Prediction(_wllama, 330_000_000, 340),
    "onnxruntime-genai": _Prediction(_onnxruntime_genai, 66_000_000, 500),
    "onnxruntime": _Prediction(_onnxruntime, 60_000_000, 0),
    "transformers.js": _Prediction(_transformers_js, 300_000_000, 500)}
