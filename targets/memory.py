"""How much memory a model takes in a runtime, from its shape alone: bytes as the runtimes allocate them.

llama.cpp's part is derived from its source (0.5.0, as in llama-cpp-python 0.3.36), onnxruntime's (1.31) from
measurements; benchmarks/fit.py sets both beside the resident sets of real processes. What node and browsers add is
fitted to two or three measurements each (node 20, headless Chromium 156). A prompt is taken to fill the context.
"""
from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from lrc_edge.families import EMBEDDING, HEAD, Weight, weights_of
from lrc_edge.shape import ModelShape

BLOCK = 32  # weights that share a scale
# Bytes of a block, (linears, embedding and head). Source: export/quantize.py for GGUF, export/onnx_weights.py for ONNX,
# whose scales are float32.
_BLOCK_BYTES = {"gguf:q4_0": (18, 34), "gguf:q8_0": (34, 34), "gguf:f16": (64, 64), "onnx:q4": (20, 36),
                "onnx:q8": (36, 36)}
_CACHE_BYTES = {"f16": 2.0, "q8_0": 34 / BLOCK, "q4_0": 18 / BLOCK}  # an element of llama.cpp's KV cache
GROUPS = ("embedding", "attention", "ffn", "norms", "head")

# The process with a model of no size (VmHWM, Linux x86-64): Python with numpy, node, or a browser's page. A program in
# C++ takes less than Python.
_RUNTIME_BYTES = {"llama.cpp": 47_000_000, "node-llama-cpp": 98_000_000, "wllama": 330_000_000,
                  "onnxruntime": 60_000_000, "onnxruntime-genai": 66_000_000, "transformers.js": 300_000_000}
# A token of the vocabulary: strings, ids, merges. Of llama.cpp, measured with real ones: 318 (Qwen2) to 424 (Llama 3)
# for BPE; 152 for SentencePiece, which are small. node reads the file's metadata into JavaScript as well. Plain
# onnxruntime has no tokenizer.
_VOCABULARY_BYTES = {"llama.cpp": 340, "wllama": 340, "node-llama-cpp": 840, "onnxruntime": 0,
                     "onnxruntime-genai": 500, "transformers.js": 500}
_BATCH = 512  # llama.cpp's n_ubatch, and wllama's
_CONTEXT_STEP = 256  # llama.cpp rounds the context up to this (llama_context's constructor)
# While a plain onnxruntime decodes, a step's whole new cache stands beside the last one, and the arena has holes of
# older ones: 1.47 to 1.48 times the cache where it is nearly all there is. Part of it goes where the prompt's
# activations were; how much depends on how the arena was split. Both are fitted: 20 points were within 10 %.
_GROWING_CACHE, _USED_AGAIN = 1.5, 0.8
# In a page the file stays in JavaScript beside the module's copy, and so do, until they are collected, old caches and
# logits: how many times more of each.
_PAGE_WEIGHTS, _PAGE_CACHE, _PAGE_LOGITS = 0.9, 2.6, 2.5


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak, by what they are for."""

    weights: int  # as the file has them
    copies: int  # what the runtime makes of weights for its kernels, beside the file's
    kv_cache: int
    working: int  # activations, logits, scratch
    runtime: int  # the program itself, its vocabulary
    # Of `weights`: mapped from the file and not read again once copied. They count in the resident set, but the system
    # can drop them when it needs the room.
    droppable: int

    @property
    def peak(self) -> int:
        """The largest resident set (Linux: VmHWM); in a browser the tab's heap."""
        return self.weights + self.copies + self.kv_cache + self.working + self.runtime

    @property
    def needed(self) -> int:
        return self.peak - self.droppable


def weight_bytes(weight: Weight, format_: str) -> int:
    """Bytes of one tensor in a file of that format (a key of profile.FORMATS). Vectors are float32."""
    if len(weight.shape) < 2:
        return 4 * weight.numel
    rows, row = math.prod(weight.shape[:-1]), weight.shape[-1]
    if format_.startswith("gguf:") and row % BLOCK:
        return 2 * weight.numel  # llama.cpp falls back to F16; ONNX pads
    return rows * math.ceil(row / BLOCK) * _BLOCK_BYTES[format_][weight.role in (EMBEDDING, HEAD)]


def bytes_by_group(shape: ModelShape, format_: str) -> dict[str, int]:
    """Bytes of GROUPS in a file of that format, all layers together; a tied head takes none."""
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
    """llama.cpp keeps the cache in F16 by default (`cache`: its type there), our ONNX graphs in float32."""
    return int((_CACHE_BYTES[cache] if format_.startswith("gguf:") else 4) * shape.kv_elements_per_token)


def memory_of(shape: ModelShape, format_: str, runtime: str, context: int, features: Collection[str],
              cache: str = "f16") -> Memory:
    """What `runtime` takes for a file of that format and a prompt that fills `context`, on a processor with `features`.

    Both names as profiles have them (profile.FORMATS, GGUF_RUNTIMES and ONNX_RUNTIMES). `cache`: the type of
    llama.cpp's KV cache.
    """
    if format_.startswith("gguf:"):
        return _llama_cpp(shape, format_, runtime, context, features, cache)
    return _onnxruntime(shape, format_, runtime, context)


# llama.cpp


def _llama_cpp(shape: ModelShape, format_: str, runtime: str, context: int, features: Collection[str], cache: str
               ) -> Memory:
    padded = math.ceil(context / _CONTEXT_STEP) * _CONTEXT_STEP
    repacked, originals = _repacked(shape, format_, features)
    working = _llama_cpp_activations(shape, format_, context, padded)
    if runtime == "wllama":  # an address space of 32 bits: what is reserved counts, touched or not
        working = max(working, 4 * min(_BATCH, context) * (shape.vocab_size + 2 * shape.hidden_size))
    return Memory(
        weights=sum(bytes_by_group(shape, format_).values()), copies=repacked, working=working,
        kv_cache=padded * kv_bytes_per_token(shape, format_, cache), droppable=originals,
        runtime=_own(shape, runtime))


def _own(shape: ModelShape, runtime: str) -> int:
    return _RUNTIME_BYTES[runtime] + _VOCABULARY_BYTES[runtime] * shape.vocab_size


def _repacked(shape: ModelShape, format_: str, features: Collection[str]) -> tuple[int, int]:
    """Bytes of the matrices that llama.cpp copies into interleaved rows when it loads, and of those whose original is
    not read any more: a tied head's is, as the embedding. Source: ggml_repack_get_optimal_repack_type in ggml-cpu.
    """
    dotprod = "dotprod" in features or "i8mm" in features
    # Bytes of a block (Q4_0, Q8_0) -> rows that are interleaved.
    rows_of = {18: 8 if "avx2" in features else 4 if dotprod else 0, 34: 4 if dotprod else 0}
    copied = originals = 0
    for weight in weights_of(shape):
        is_embedding = weight.role is EMBEDDING
        if len(weight.shape) < 2 or weight.shape[1] % BLOCK or (is_embedding and not shape.tied):
            continue
        step = rows_of.get(_BLOCK_BYTES[format_][weight.role in (EMBEDDING, HEAD)], 0)
        if step and weight.shape[0] % step == 0:
            copied += weight_bytes(weight, format_)
            originals += 0 if is_embedding else weight_bytes(weight, format_)
    return copied, originals


def _llama_cpp_activations(shape: ModelShape, format_: str, context: int, padded: int) -> int:
    """The compute buffer as far as it is touched, the work buffer, and one row of logits.

    The compute buffer holds the mask (T x context, F16), the residual stream and its norm and two rows more of their
    size where the allocator leaves holes, and either gate, up and their product, or query, attended query, key and
    value. (With logits of one token it has more room than it uses: T x vocabulary, which only `score` touches.) The
    work buffer has a matrix product's input in the type of its kernel.
    """
    tokens = min(_BATCH, context)
    mask = 2 * tokens * padded
    rows = 4 * tokens * (4 * shape.hidden_size + max(3 * shape.intermediate_size, 2 * (shape.q_size + shape.kv_size)))
    widest = max(shape.hidden_size, shape.intermediate_size, shape.q_size)
    work = tokens * widest * (2 if format_ == "gguf:f16" else 34 / 32)
    return mask + rows + int(work) + 4 * shape.vocab_size


# onnxruntime


def _onnxruntime(shape: ModelShape, format_: str, runtime: str, context: int) -> Memory:
    cache = context * kv_bytes_per_token(shape, format_)
    # The whole prompt in one pass, logits for every position. The planner lets values of one shape share a buffer for
    # the run: residual, norm and two outputs; queries, rotated, attended; keys and values, rotated and in the order of
    # heads; gate, silu, up; and the widest product's input as int8 with its scales.
    widths = (4 * shape.hidden_size + 3 * shape.q_size + 5 * shape.kv_size + 3 * shape.intermediate_size
              + 0.3 * max(shape.hidden_size, shape.q_size, shape.intermediate_size))
    logits = 4 * context * shape.vocab_size
    working = int(4 * context * widths) + logits
    rope_tables = 4 * shape.max_position_embeddings * shape.head_dim
    weights = sum(bytes_by_group(shape, format_).values()) + rope_tables
    copies = _prepacked(shape)
    if runtime == "onnxruntime":
        working += max(0, int(_GROWING_CACHE * cache - _USED_AGAIN * working))
    elif runtime == "transformers.js":
        working += int(_PAGE_CACHE * cache + _PAGE_LOGITS * logits)
        copies = int(_PAGE_WEIGHTS * weights)
    return Memory(weights=weights, copies=copies, kv_cache=cache, working=working, runtime=_own(shape, runtime),
                  droppable=0)


def _prepacked(shape: ModelShape) -> int:
    """MatMulNBits packs a matrix anew with scales and sums of its blocks, 8 bytes each, and lets go of the file's
    levels; those of a tied head stay, for they are the embedding's, too.
    """
    copies = 0
    for weight in weights_of(shape):
        if len(weight.shape) == 2 and (weight.role is not EMBEDDING or shape.tied):
            blocks = weight.shape[0] * math.ceil(weight.shape[1] / BLOCK)
            copies += blocks * (8 + BLOCK * (weight.role is EMBEDDING))
    return copies
