"""Chat with a GGUF in the terminal, through llama.cpp and the model's own chat template."""
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llama_cpp import Llama

from lrc_edge import llama_log
from lrc_edge.errors import UserError
from lrc_edge.targets.runtimes.llama_probe import sound_buffers


class Chat:
    """A conversation with one GGUF file. Without a chat template each line is continued as plain text."""

    def __init__(self, path: Path, n_ctx: int, threads: int):
        llama_log.listen()  # llama-cpp-python's own log callback prints warnings as errors
        try:
            with sound_buffers():
                self.llm = Llama(str(path), n_ctx=n_ctx, n_threads=threads, verbose=False)
        except ValueError as error:
            raise UserError(f"{path}: llama.cpp cannot load it; check it with lrc-edge inspect") from error
        self.has_template = "tokenizer.chat_template" in self.llm.metadata
        self.messages: list[dict[str, str]] = []

    def reply(self, text: str, temperature: float, max_tokens: int) -> Iterator[str]:
        """Yield the answer, piece by piece. If the conversation exceeds the context, it restarts with this message."""
        options: dict[str, Any] = {"stream": True, "temperature": temperature, "max_tokens": max_tokens}
        if not self.has_template:
            for part in self.llm.create_completion(text, **options):
                yield part["choices"][0]["text"]  # type: ignore[index]
            return
        self.messages.append({"role": "user", "content": text})
        pieces: list[str] = []
        try:
            yield from self._stream(options, pieces)
        except ValueError:  # the prompt exceeds the context
            self.messages = self.messages[-1:]
            yield from self._stream(options, pieces)
        self.messages.append({"role": "assistant", "content": "".join(pieces)})

    def _stream(self, options: dict[str, Any], pieces: list[str]) -> Iterator[str]:
        parts: Any = self.llm.create_chat_completion(self.messages, **options)  # type: ignore[arg-type]
        for part in parts:
            piece = part["choices"][0]["delta"].get("content")
            if piece:
                pieces.append(piece)
                yield piece
