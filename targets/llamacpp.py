"""llama.cpp, through llama-cpp-python's low-level API: the runtime of every GGUF file."""
from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

import llama_cpp
import numpy as np
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

from lrc_edge import llama_log
from lrc_edge.errors import UserError

CHUNK = 512  # tokens in one llama_decode; llama.cpp keeps logits for all of them, V * 4 bytes each
GGML_TYPE_F32 = 0


class LlamaCpp:
    """A GGUF file loaded on the CPU; implements lrc_edge.targets.runtime.TextRuntime.

    The KV cache is F32 and flash attention is off: llama.cpp's default cache is F16, and its rounding would hide what
    the weights do. `as_shipped`: llama.cpp's own defaults instead, as programs on devices have them. n_ctx: tokens of
    the longest row, 0 for the file's own context length. threads: at most the machine's processors, which is also the
    default. Raises UserError when the file does not load.
    """

    def __init__(self, path: Path | str, n_ctx: int = 2048, threads: int | None = None, as_shipped: bool = False):
        self.path = Path(path)
        self.label = f"llama.cpp (llama-cpp-python {llama_cpp.__version__})"
        self._context: llama_cpp.llama_context_p | None = None
        llama_log.listen()
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        model = llama_cpp.llama_model_load_from_file(os.fsencode(self.path), params)
        if model is None:
            raise UserError(f"{self.path}: llama.cpp cannot load this file ({llama_log.errors()}); export it again")
        self._model = model
        self._vocab = llama_cpp.llama_model_get_vocab(model)
        self.vocab_size = int(llama_cpp.llama_vocab_n_tokens(self._vocab))
        self._context = self._new_context(n_ctx, threads, as_shipped)
        self._batch = llama_cpp.llama_batch_init(CHUNK, 0, 1)
        self.n_ctx = int(llama_cpp.llama_n_ctx(self._context))

    def _new_context(self, n_ctx: int, threads: int | None, as_shipped: bool) -> llama_cpp.llama_context_p:
        processors = os.cpu_count() or 1
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = n_ctx
        params.n_batch = params.n_ubatch = CHUNK
        params.n_threads = params.n_threads_batch = min(threads or processors, processors)
        if not as_shipped:
            params.type_k = params.type_v = GGML_TYPE_F32
            params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        context = llama_cpp.llama_init_from_model(self._model, params)
        if context is None:
            llama_cpp.llama_model_free(self._model)
            raise UserError(f"{self.path}: llama.cpp cannot make a context of {n_ctx} tokens ({llama_log.errors()}); "
                            "ask for fewer")
        return context

    # Logits

    def prefill(self, ids: np.ndarray) -> np.ndarray:
        return self._evaluate(ids, CHUNK)

    def decode(self, ids: np.ndarray) -> np.ndarray:
        return self._evaluate(ids, 1)

    def generate(self, ids: list[int], n_tokens: int, stop: set[int]) -> list[int]:
        made: list[int] = []
        self._forget(len(ids) + n_tokens)
        step = list(ids)
        while len(made) < n_tokens:
            for part in _parts(step, CHUNK):
                self._feed(part, all_logits=False)
            token = int(np.argmax(self._logits(-1)))
            if token in stop:
                break
            made.append(token)
            step = [token]
        return made

    def _evaluate(self, ids: np.ndarray, chunk: int) -> np.ndarray:
        """(T,) -> (T, V) float32, `chunk` tokens in one call."""
        tokens = [int(i) for i in np.asarray(ids).reshape(-1)]
        self._forget(len(tokens))
        logits = np.empty((len(tokens), self.vocab_size), dtype=np.float32)
        done = 0
        for part in _parts(tokens, chunk):
            self._feed(part, all_logits=True)
            for i in range(len(part)):
                logits[done + i] = self._logits(i)
            done += len(part)
        return logits

    def _forget(self, n_tokens: int) -> None:
        """Empty the KV cache for a row of n_tokens."""
        if self._context is None:
            raise ValueError(f"{self.path}: used after close()")
        if n_tokens > self.n_ctx:
            raise ValueError(f"{self.path}: a row of {n_tokens} tokens in a context of {self.n_ctx}")
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        self._position = 0

    def _feed(self, tokens: list[int], all_logits: bool) -> None:
        batch = self._batch
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i] = token
            batch.pos[i] = self._position + i
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = all_logits or i == len(tokens) - 1
        status = llama_cpp.llama_decode(self._context, batch)
        if status:
            raise RuntimeError(f"{self.path}: llama_decode failed with status {status}: {llama_log.errors()}")
        self._position += len(tokens)

    def _logits(self, i: int) -> np.ndarray:
        """(V,) of the last call's token i; a view that the next call overwrites."""
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self._context, i), shape=(self.vocab_size,))

    # Text

    def tokenize(self, text: str) -> list[int]:
        return self._tokenize(text, add_special=True)

    def _tokenize(self, text: str, add_special: bool) -> list[int]:
        data = text.encode("utf-8", errors="surrogatepass")
        size = len(data) + 8
        while True:
            buffer = (llama_cpp.llama_token * size)()
            n = llama_cpp.llama_tokenize(self._vocab, data, len(data), buffer, size, add_special, True)
            if n >= 0:
                return list(buffer[:n])
            size = -n

    def detokenize(self, ids: list[int]) -> str:
        """Pieces one after the other, as a streaming client prints them: a leading space stays."""
        return b"".join(self.piece(i) for i in ids).decode("utf-8", errors="replace")

    def piece(self, token: int, special: bool = False) -> bytes:
        """Bytes of one token; of a control token only when `special`."""
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            n = llama_cpp.llama_token_to_piece(self._vocab, token, buffer, size, 0, special)
            if n >= 0:
                return buffer.raw[:n]
            size = -n

    @property
    def chat_template(self) -> str | None:
        """The file's default chat template (Jinja), or None."""
        template = llama_cpp.llama_model_chat_template(self._model, None)
        return template.decode("utf-8") if template else None

    def render_chat(self, messages: list[dict[str, str]]) -> tuple[str, list[int]]:
        """The file's template in llama-cpp-python's Jinja, then llama.cpp's ids.

        The template writes the BOS where it wants one, so none is added: that is what Hugging Face's
        apply_chat_template and llama-cpp-python's chat completion do. Raises UserError without a template.
        """
        if self.chat_template is None:
            raise UserError(f"{self.path}: holds no chat template; use plain prompts")
        formatter = Jinja2ChatFormatter(
            template=self.chat_template, add_generation_prompt=True,
            bos_token=self._special_text(llama_cpp.llama_vocab_bos(self._vocab)),
            eos_token=self._special_text(llama_cpp.llama_vocab_eos(self._vocab)))
        prompt = formatter(messages=messages).prompt  # type: ignore[arg-type]  # plain dicts are what it takes
        return prompt, self._tokenize(prompt, add_special=False)

    def _special_text(self, token: int) -> str:
        return self.piece(token, special=True).decode("utf-8") if token >= 0 else ""

    @property
    def end_tokens(self) -> set[int]:
        """Tokens at which llama.cpp ends a generation."""
        return {i for i in range(self.vocab_size) if llama_cpp.llama_vocab_is_eog(self._vocab, i)}

    def close(self) -> None:
        if self._context is not None:
            llama_cpp.llama_batch_free(self._batch)
            llama_cpp.llama_free(self._context)
            llama_cpp.llama_model_free(self._model)
            self._context = None

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _parts(tokens: list[int], size: int) -> Iterator[list[int]]:
    return (tokens[i:i + size] for i in range(0, len(tokens), size))
