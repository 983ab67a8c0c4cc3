"""The child process of llama_probe.py: a tiny model in llama.cpp, with or without the extra buffers."""
from __future__ import annotations

import json
import struct
import sys
import tempfile
from typing import Any

import numpy as np

from lrc_edge.targets.runtimes.llamacpp import LlamaCpp

# The tiny model: rows that divide by every block, and enough of them for a tile.
WIDTH, VOCAB, N_TOKENS = 256, 64, 32


def tiny_model() -> bytes:
    """Return a GGUF of one random llama layer in Q8_0, written without the gguf package, which may be missing."""
    rng = np.random.default_rng(0)
    metadata: list[tuple[str, Any]] = [
        ("general.architecture", "llama"), ("llama.context_length", N_TOKENS), ("llama.embedding_length", WIDTH),
        ("llama.block_count", 1), ("llama.feed_forward_length", WIDTH), ("llama.attention.head_count", 4),
        ("llama.attention.layer_norm_rms_epsilon", 1e-5), ("llama.vocab_size", VOCAB),
        ("tokenizer.ggml.model", "no_vocab")]
    matrices = {"token_embd.weight": VOCAB, "output.weight": VOCAB,
                **{f"blk.0.{name}.weight": WIDTH for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate",
                                                              "ffn_up", "ffn_down")}}
    vectors = ("output_norm.weight", "blk.0.attn_norm.weight", "blk.0.ffn_norm.weight")
    # Both encodings: the FFN in Q4_0, which x86 repacks, the rest in Q8_0, which only AMX and Arm do.
    tensors: list[tuple[str, tuple[int, ...], int, bytes]] = [
        (name, (WIDTH, rows), *(_q4_0(rng, rows) if "ffn" in name else _q8_0(rng, rows)))
        for name, rows in matrices.items()]
    tensors += [(name, (WIDTH,), 0, np.ones(WIDTH, np.float32).tobytes()) for name in vectors]
    header = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(metadata))
    header += b"".join(_string(key) + _value(value) for key, value in metadata)
    offset = 0
    for name, shape, kind, data in tensors:
        header += _string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
        offset += len(data)  # every length is a multiple of the alignment
    return header + bytes(-len(header) % 32) + b"".join(data for *_, data in tensors)


def _q8_0(rng: np.random.Generator, rows: int) -> tuple[int, bytes]:
    """Return ggml's number of the type, and blocks of 32 weights of about 1/16: a float16 scale, then 32 integers."""
    blocks = np.zeros(rows * WIDTH // 32, np.dtype([("scale", "<f2"), ("quants", "i1", 32)]))
    blocks["scale"] = 1 / 1024
    blocks["quants"] = rng.integers(-127, 128, (len(blocks), 32))
    return 8, blocks.tobytes()


def _q4_0(rng: np.random.Generator, rows: int) -> tuple[int, bytes]:
    """Like `_q8_0`, with 4-bit integers, two per byte."""
    blocks = np.zeros(rows * WIDTH // 32, np.dtype([("scale", "<f2"), ("quants", "u1", 16)]))
    blocks["scale"] = 1 / 64
    blocks["quants"] = rng.integers(0, 256, (len(blocks), 16))
    return 2, blocks.tobytes()


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def _value(value: Any) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", 8) + _string(value)
    return struct.pack("<If", 6, value) if isinstance(value, float) else struct.pack("<II", 4, value)


def main(use_extra: bool) -> None:
    """Print the logits (N_TOKENS x VOCAB values) as JSON."""
    with tempfile.NamedTemporaryFile(suffix=".gguf") as file:
        file.write(tiny_model())
        file.flush()
        with LlamaCpp(file.name, n_ctx=N_TOKENS, threads=1, extra_buffers=use_extra) as runtime:
            logits = runtime.prefill(np.arange(N_TOKENS) % VOCAB)
    print(json.dumps(logits.ravel().tolist()))


if __name__ == "__main__":
    main(sys.argv[1] == "1")
