"""Compare a file's chat template with the model's: equal as text, or at least in what it renders."""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lrc_edge.finding import Finding, differs

_USER, _ASSISTANT = {"role": "user", "content": " Hello, 世界! "}, {"role": "assistant", "content": "Hi."}
_SYSTEM = {"role": "system", "content": "Be brief."}
# (messages, add_generation_prompt)
CONVERSATIONS: tuple[tuple[list[dict[str, str]], bool], ...] = (
    ([_USER], True), ([_USER, _ASSISTANT, _USER], True), ([_SYSTEM, _USER], True), ([_USER, _ASSISTANT], False))


def audit_template(found: Any, tokenizer: PreTrainedTokenizerBase) -> Iterator[Finding]:
    """`found`: the file's template, None when it has none; `tokenizer`: the model's. Renders in Jinja's sandbox."""
    expected = tokenizer.chat_template
    if isinstance(expected, dict):  # several; programs take this one
        expected = expected.get("default")
    if expected is None or found is None:
        if (expected is None) != (found is None):
            yield differs("chat template", found, expected, severity="fault" if found is None else "note")
    elif not isinstance(found, str):
        yield differs("chat template", found, expected)
    elif _plain(found) != _plain(expected):
        different = sum(_rendered(tokenizer, found, *conversation) != _rendered(tokenizer, expected, *conversation)
                        for conversation in CONVERSATIONS)
        if different:
            yield differs("chat template", found, expected,
                          f"{different} of {len(CONVERSATIONS)} conversations are rendered otherwise")
        else:
            yield differs("chat template", found, expected, "renders the same conversations", "note")


def _plain(template: str) -> str:
    return template.replace("\r\n", "\n").strip()


def _rendered(tokenizer: Any, template: str, messages: list[dict[str, str]], prompt: bool) -> str:
    try:
        return str(tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False,
                                                 add_generation_prompt=prompt))
    except Exception as error:  # templates refuse conversations with errors of their own
        return f"refused: {type(error).__name__}"
