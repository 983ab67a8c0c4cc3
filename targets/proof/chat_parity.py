"""Compare how runtimes render conversations with Hugging Face; each engine is reported by name.

llama.cpp has three engines: llama-cpp-python renders with Jinja, llama_chat_apply_template (the C API, which many
bindings use) imitates the templates of some families, and llama-server has its own Jinja. The first is a gate. The C
API cannot render every template, so its result is only reported, and so is that of llama-server, if this machine has
one.
"""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lrc_edge.parity import Gate
from lrc_edge.targets.runtimes.llama_server import LlamaServer, server_program
from lrc_edge.targets.runtimes.worker import WorkerFailed
from lrc_edge.targets.runtimes.worker_runtime import WorkerRuntime

CONVERSATIONS: tuple[list[dict[str, str]], ...] = (
    [{"role": "user", "content": "Hello!"}],
    [{"role": "system", "content": "You tell stories."}, {"role": "user", "content": "  One about a cat, please.\n"}],
    [{"role": "user", "content": "Count: 1 2 3"}, {"role": "assistant", "content": "4, 5 é 😀"},
     {"role": "user", "content": "{{ 'go' }} <on> & \"on\""}],
)
# What may render a chat (Runtime.chat_engines) -> its name in the report.
ENGINES = {"jinja": "Jinja (llama-cpp-python)", "c_api": "llama.cpp's C API", "server": "llama-server"}
Render = Callable[[list[dict[str, str]]], tuple[str, list[int]]]


class ChatParity:
    """Renders with Hugging Face once, then compares each runtime's engines."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._bos, self._bos_text = tokenizer.bos_token_id, str(tokenizer.bos_token or "")
        self._expected: list[tuple[list[dict[str, str]], str, list[int]]] = []
        for messages in CONVERSATIONS if tokenizer.chat_template else ():
            try:
                text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
            except Exception:  # a template may refuse a role, by raising whatever it likes
                continue
            self._expected.append((messages, text, list(tokenizer(text, add_special_tokens=False)["input_ids"])))

    def judge(self, artifact: str, runtime: WorkerRuntime, name: str, file: Path
              ) -> tuple[list[Gate], dict[str, Any] | None]:
        """Return the gates of the runtime's own Jinja and the report's row; empty if there is no template."""
        if not self._expected:
            return [], None
        gate = Gate(name, artifact, "mismatches", None, 0, "==")
        once = Gate(f"{name}, BOS", artifact, "mismatches", None, 0, "==")
        row: dict[str, Any] = {"artifact": artifact, "equal": False, "expected": self._expected[0][1], "got": "",
                               "engines": {}}
        try:
            found = [runtime.render_chat(messages) for messages, _, _ in self._expected]
        except WorkerFailed as error:
            return [gate.because(str(error)), once.because(str(error))], {**row, "got": str(error)}
        row["artifact"] = f"{artifact} ({runtime.label})"
        wrong = [(want, got) for want, got in zip(self._expected, found, strict=True)
                 if (want[1], want[2]) != (got[0], list(got[1]))]
        row |= {"equal": not wrong, "got": found[0][0]}
        if wrong:
            (_, text, ids), (got, got_ids) = wrong[0]
            row |= {"expected": text, "got": got + (f" {list(got_ids)} instead of {ids}" if got == text else "")}
        judged, *others = runtime.row.chat_engines
        if others:
            row["engines"] = {ENGINES[judged]: _yes(not wrong), **{
                ENGINES[engine]: self._other_engine(engine, runtime, file) for engine in others}}
        doubled = [(self._leading_bos(want[2]), self._leading_bos(got[1]))
                   for want, got in zip(self._expected, found, strict=True)]
        bos = [(want, got) for want, got in doubled if want != got or got > 1]
        why = f"{bos[0][1]} BOS before a chat, Hugging Face writes {bos[0][0]}; need at most one" if bos else ""
        return [gate.judged(len(wrong)), once.judged(len(bos)).because(why)], row

    def _leading_bos(self, ids: list[int]) -> int:
        n = 0
        while self._bos is not None and n < len(ids) and ids[n] == self._bos:
            n += 1
        return n

    def _other_engine(self, engine: str, runtime: WorkerRuntime, file: Path) -> str:
        """Return "yes", "no", or why the engine did not run."""
        if engine != "server":  # a program of its own
            return self._report(lambda messages: runtime.render_chat(messages, engine))
        program = server_program()
        if program is None:
            return "not run: no llama-server on PATH"
        try:
            with LlamaServer(program, file) as server:
                return self._report(server.render_chat)
        except WorkerFailed as error:
            return f"not run: {error}"

    def _report(self, render: Render) -> str:
        """Compare the texts, then check whether the program adds a second BOS while it tokenizes."""
        try:
            for messages, text, ids in self._expected:
                got, got_ids = render(messages)
                bos = self._leading_bos(got_ids)
                # The C API leaves the BOS that the template writes to the tokenizer.
                if got != text and not (bos == 1 == self._leading_bos(ids) and text == self._bos_text + got):
                    return f"no: {got[:80]!r} instead of {text[:80]!r}"
                if bos > 1:
                    return f"no: {bos} BOS before a chat"
        except WorkerFailed as error:
            return f"no: {error}"
        return "yes"


def _yes(equal: bool) -> str:
    return "yes" if equal else "no"
