"""The Ollama Modelfile next to the GGUF files: `ollama create NAME -f Modelfile`."""
from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from gguf import TokenType
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.export.gguf.vocabulary import Vocabulary

# The most useful file first: small, and close to the original at any model size.
PREFERRED = ("q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0", "f16", "bf16", "f32")
# Types of tokens whose text in the vocabulary is the text itself. At others Ollama stops only by the GGUF's ids.
_WRITTEN_OUT = (TokenType.CONTROL, TokenType.USER_DEFINED)
_PROBES = (
    [{"role": "user", "content": "Hello"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"},
     {"role": "assistant", "content": "Hello!"}, {"role": "user", "content": "How are you?\nWell?"}],
)


def _chatml(messages: list[dict[str, str]]) -> str:
    turns = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
    return turns + "<|im_start|>assistant\n"


def _llama3(messages: list[dict[str, str]]) -> str:
    turns = "".join(f"<|start_header_id|>{m['role']}<|end_header_id|>\n\n{m['content']}<|eot_id|>" for m in messages)
    return turns + "<|start_header_id|>assistant<|end_header_id|>\n\n"


# What a chat template may render, and the Go template that renders it in Ollama.
_GO_TEMPLATES: tuple[tuple[Callable[[list[dict[str, str]]], str], str], ...] = (
    (_chatml, "{{ range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n"
              "{{ end }}<|im_start|>assistant\n"),
    (_llama3, "{{ range .Messages }}<|start_header_id|>{{ .Role }}<|end_header_id|>\n\n{{ .Content }}<|eot_id|>"
              "{{ end }}<|start_header_id|>assistant<|end_header_id|>\n\n"),
)


def write_modelfile(checkpoint: DenseCheckpoint, vocabulary: Vocabulary, files: Mapping[str, Path]) -> Path:
    """Write a Modelfile for the preferred one of the files (encoding -> path), next to them. Return its path."""
    file = next((files[name] for name in PREFERRED if name in files), next(iter(files.values())))
    lines = [f"FROM ./{file.name}"]
    tokenizer = checkpoint.tokenizer()
    template = go_template(tokenizer)
    if template is not None:
        lines.append(f'TEMPLATE """{template}"""')
    elif vocabulary.chat_template is not None:
        lines.append("# No TEMPLATE: this chat template has no checked Go form; Ollama may know it from the GGUF.")
    ids = vocabulary.special_ids
    stops = (*(ids[name] for name in ("eos", "eot") if name in ids), *checkpoint.stop_ids(tokenizer))
    for token in dict.fromkeys(stops):
        if vocabulary.types[token] in _WRITTEN_OUT:
            lines.append(f'PARAMETER stop "{_quoted(vocabulary.tokens[token])}"')
    if licence := _licence(checkpoint):
        lines.append(f'LICENSE """{licence}"""')
    path = file.with_name("Modelfile")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def go_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the Go template that renders the same as the tokenizer's chat template; None if none is known.

    The BOS is left out: Ollama adds it if the GGUF asks for it.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    bos = getattr(tokenizer, "bos_token", None) or ""
    for render, template in _GO_TEMPLATES:
        try:
            rendered = [str(tokenizer.apply_chat_template(probe, tokenize=False, add_generation_prompt=True))
                        for probe in _PROBES]
        except Exception:  # a template may refuse the system role or anything else with any exception
            return None
        if [text.removeprefix(bos) for text in rendered] == [render(probe) for probe in _PROBES]:
            return template
    return None


def _licence(checkpoint: DenseCheckpoint) -> str:
    """Return the licence text next to the weights, else the licence that the card names."""
    for name in ("LICENSE", "LICENSE.txt", "LICENSE.md"):
        if (checkpoint.path / name).is_file():
            text = (checkpoint.path / name).read_text(encoding="utf-8", errors="replace")
            return text.strip().replace('"""', "'''")
    named = checkpoint.card.get("license")
    return re.sub(r"\s+", " ", str(named)).replace('"""', "'''") if named else ""


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
