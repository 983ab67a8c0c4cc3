"""llama.cpp, through llama-cpp-python's low-level API: the runtime of every GGUF file."""
from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import llama_cpp
import numpy as np
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

from lrc_edge import llama_log
from lrc_edge.errors import UserError
from lrc_edge.machine import processors
from lrc_edge.targets.runtimes import llama_probe
from lrc_edge.targets.runtimes.protocol import TextRuntime, parts

CHUNK = 512  # tokens per llama_decode; llama.cpp keeps the logits of all of them, V * 4 bytes each
# Types of the KV cache, with ggml's number of each. llama.cpp's own default is f16.
CACHES = {"f32": 0, "f16": 1, "q8_0": 8, "q4_0": 2}


class LlamaCpp(TextRuntime):
    """A GGUF file loaded by llama.cpp on the CPU.

    n_ctx: tokens of the longest sequence; 0: the file's own context length. threads: at most the machine's processors,
    which is also the default. cache: a key of CACHES. The default is f32 without flash attention, so that differences
    from PyTorch come from the weights; the others use llama.cpp's own defaults, as programs on devices do.
    extra_buffers: whether llama.cpp may repack weights for this processor; by default llama_probe decides.
    Raises UserError when the file does not load.
    """

    def __init__(self, path: Path | str, n_ctx: int = 2048, threads: int | None = None, cache: str = "f32",
                 extra_buffers: bool | None = None):
        self.path = Path(path)
        self.label = f"llama.cpp (llama-cpp-python {llama_cpp.__version__})"
        self._context: llama_cpp.llama_context_p | None = None
        self._batch: llama_cpp.llama_batch | None = None
        self._threads = min(threads or processors(), processors())
        llama_log.listen()
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        params.use_extra_bufts = llama_probe.extra_buffers().usable if extra_buffers is None else extra_buffers
        model = llama_cpp.llama_model_load_from_file(os.fsencode(self.path), params)
        if model is None:
            raise UserError(f"{self.path}: llama.cpp cannot load this file ({llama_log.errors()}); export it again")
        self._model = model
        self._vocab = llama_cpp.llama_model_get_vocab(model)
        # A file without a vocabulary has an output matrix all the same.
        self.vocab_size = int(llama_cpp.llama_vocab_n_tokens(self._vocab)) or _rows_of_output(model)
        try:
            self.new_context(n_ctx, cache=cache)
        except UserError:
            llama_cpp.llama_model_free(self._model)
            raise

    def new_context(self, n_ctx: int, n_rows: int = 1, cache: str = "f32") -> None:
        """Replace the KV cache by an empty one for `n_rows` sequences of n_ctx tokens each.

        Raises UserError if llama.cpp cannot create it.
        """
        self._free_context()
        params = llama_cpp.llama_context_default_params()
        # Each sequence has its own part, which llama.cpp rounds up to 256 tokens.
        params.n_ctx = n_ctx if n_rows == 1 else n_rows * (-(-n_ctx // 256) * 256)
        params.n_seq_max = n_rows
        params.n_batch = params.n_ubatch = CHUNK
        params.n_threads = params.n_threads_batch = self._threads
        params.type_k = params.type_v = CACHES[cache]
        if cache == "f32":
            params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if self._context is None:
            raise UserError(f"{self.path}: llama.cpp cannot create a context of {n_ctx} tokens, KV cache in {cache} "
                            f"({llama_log.errors()}); use fewer tokens, or another type")
        self._batch = llama_cpp.llama_batch_init(CHUNK, 0, 1)
        self.n_ctx = int(llama_cpp.llama_n_ctx(self._context)) // n_rows
        self._n_rows = n_rows

    # Logits

    def read(self, ids: np.ndarray, positions: Sequence[int], alone: Sequence[int]) -> np.ndarray:
        tokens = [int(i) for i in np.asarray(ids).reshape(-1)]
        self._forget(len(tokens))
        logits = np.empty((len(positions), self.vocab_size), dtype=np.float32)
        wanted = {position: row for row, position in enumerate(positions)}
        for start, end in parts(len(tokens), alone, CHUNK):
            kept = [p - start for p in range(start, end) if p in wanted]
            self._feed([(tokens[p], p, 0) for p in range(start, end)], kept)
            for i in kept:
                logits[wanted[start + i]] = self._logits(i)
        return logits

    def decode_rows(self, rows: np.ndarray) -> Iterator[np.ndarray]:
        """Decode rows (B, T) together, B at most the context's n_rows; yield (B, V) T times."""
        n_rows, length = rows.shape
        self._forget(length)
        for t in range(length):
            self._feed([(int(rows[row, t]), t, row) for row in range(n_rows)], range(n_rows))
            yield np.stack([self._logits(row) for row in range(n_rows)])

    def tokens(self, ids: list[int], n_tokens: int) -> Iterator[int]:
        self._forget(len(ids) + n_tokens)
        for start, end in parts(len(ids) - 1, (), CHUNK):
            self._feed([(ids[p], p, 0) for p in range(start, end)], [])
        position, token = len(ids) - 1, ids[-1]
        for _ in range(n_tokens):
            self._feed([(token, position, 0)], [0])
            token, position = int(np.argmax(self._logits(0))), position + 1
            yield token

    def _forget(self, n_tokens: int) -> None:
        """Empty the KV cache before a row of n_tokens is read."""
        if self._context is None:
            raise ValueError(f"{self.path}: used after close()")
        if n_tokens > self.n_ctx:
            raise ValueError(f"{self.path}: a row of {n_tokens} tokens in a context of {self.n_ctx}")
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)

    def _feed(self, tokens: list[tuple[int, int, int]], kept: Iterable[int]) -> None:
        """Decode tokens, each (token, position, sequence). `kept`: indices of those whose logits are needed."""
        batch = self._batch
        assert batch is not None
        batch.n_tokens = len(tokens)
        for i, (token, position, sequence) in enumerate(tokens):
            batch.token[i] = token
            batch.pos[i] = position  # type: ignore[call-overload]
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = sequence
            batch.logits[i] = False
        for i in kept:
            batch.logits[i] = True
        status = llama_cpp.llama_decode(self._context, batch)
        if status:
            raise RuntimeError(f"{self.path}: llama_decode failed with status {status}: {llama_log.errors()}")

    def _logits(self, i: int) -> np.ndarray:
        """Return (V,) logits of token i of the last call: a view that the next call overwrites."""
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
        """Concatenate the pieces, as a streaming client prints them: a leading space stays."""
        return b"".join(self.piece(i) for i in ids).decode("utf-8", errors="replace")

    def piece(self, token: int, special: bool = False) -> bytes:
        """Return the bytes of one token; a control token has none unless `special`."""
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            n = llama_cpp.llama_token_to_piece(self._vocab, token, buffer, size, 0, special)
            if n >= 0:
                return buffer.raw[:n]
            size = -n

    @property
    def chat_template(self) -> str | None:
        """Return the file's default chat template (Jinja), or None."""
        template = llama_cpp.llama_model_chat_template(self._model, None)
        return template.decode("utf-8") if template else None

    def render_chat(self, messages: list[dict[str, str]], engine: str = "jinja") -> tuple[str, list[int]]:
        """Render messages with the file's template; return the text and the ids that a program with that engine reads.

        jinja: llama-cpp-python's. The template writes the BOS where it wants one, so none is added: that is what
        Hugging Face's apply_chat_template and llama-cpp-python's chat completion do.
        c_api: llama_chat_apply_template, which recognizes the templates of some families by typical strings. Programs
        that use it (llama.cpp's simple-chat) tokenize with the BOS added. Raises UserError without a template, or if
        the C API does not recognize it.
        """
        if (template := self.chat_template) is None:
            raise UserError(f"{self.path}: holds no chat template; use plain prompts")
        return {"jinja": self._render_by_jinja, "c_api": self._render_by_c_api}[engine](template, messages)

    def _render_by_jinja(self, template: str, messages: list[dict[str, str]]) -> tuple[str, list[int]]:
        formatter = Jinja2ChatFormatter(
            template=template, add_generation_prompt=True,
            bos_token=self._special_text(llama_cpp.llama_vocab_bos(self._vocab)),
            eos_token=self._special_text(llama_cpp.llama_vocab_eos(self._vocab)))
        prompt = formatter(messages=messages).prompt  # type: ignore[arg-type]  # plain dicts are what it takes
        return prompt, self._tokenize(prompt, add_special=False)

    def _render_by_c_api(self, template: str, messages: list[dict[str, str]]) -> tuple[str, list[int]]:
        texts = [(message["role"].encode(), message["content"].encode()) for message in messages]
        chat = (llama_cpp.llama_chat_message * len(texts))(*texts)  # type: ignore[misc]
        size = 2 * sum(len(content) for _, content in texts) + 1024
        while True:
            buffer = ctypes.create_string_buffer(size)
            n = llama_cpp.llama_chat_apply_template(template.encode(), chat, len(texts), True, buffer,
                                                    size)
            if n < 0:
                raise UserError(f"{self.path}: llama.cpp's C API knows no such chat template; use an engine with Jinja")
            if n <= size:
                prompt = buffer.raw[:n].decode("utf-8", errors="replace")
                return prompt, self._tokenize(prompt, add_special=True)
            size = n

    def _special_text(self, token: int) -> str:
        return self.piece(token, special=True).decode("utf-8") if token >= 0 else ""

    @property
    def end_tokens(self) -> set[int]:
        """Return the tokens at which llama.cpp ends a generation."""
        return {i for i in range(self.vocab_size) if llama_cpp.llama_vocab_is_eog(self._vocab, i)}

    def close(self) -> None:
        if self._model is not None:
            self._free_context()
            llama_cpp.llama_model_free(self._model)
            self._model = None

    def _free_context(self) -> None:
        if self._context is not None:
            llama_cpp.llama_batch_free(self._batch)
            llama_cpp.llama_free(self._context)
            self._context = None

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _rows_of_output(model: llama_cpp.llama_model_p) -> int:
    buffer = ctypes.create_string_buffer(32)
    n = llama_cpp.llama_model_meta_val_str(model, b"llama.vocab_size", buffer, len(buffer))  # type: ignore[arg-type]
    return int(buffer.value) if n > 0 else 0
