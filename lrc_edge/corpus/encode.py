"""Documents as token ids: plain text as the tokenizer makes it, conversations through the teacher's chat template."""
from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import jinja2
import numpy as np

from lrc_edge.corpus.sources import Document, Messages
from lrc_edge.errors import UserError

if TYPE_CHECKING:
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase


# Llama 3's template writes today's date into every conversation, but tokens may not depend on when they were made. This
# is the date that it falls back to itself.
DAY = "26 Jul 2024"


class Encoded(NamedTuple):
    """A document as ids. `counts` says which ids the loss looks at; None: all, as in plain text."""

    ids: list[int]
    counts: np.ndarray | None = None  # (len(ids),) bool
    n_missed: int = 0  # answers that the loss leaves out because their ids could not be told apart


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Each text's ids as the tokenizer makes them (with its BOS if it has one), then EOS."""
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return [ids + eos for ids in tokenizer(texts, verbose=False)["input_ids"]] if texts else []


def encode(tokenizer: PreTrainedTokenizerBase, documents: list[Document]) -> list[Encoded | None]:
    """Each document as ids; None for a conversation that the template refuses or that has no answer to learn."""
    texts = iter(token_ids(tokenizer, [d for d in documents if isinstance(d, str)]))
    chats = iter(_encode_chats(tokenizer, [d for d in documents if not isinstance(d, str)]))
    return [Encoded(next(texts)) if isinstance(d, str) else next(chats) for d in documents]


def render(tokenizer: PreTrainedTokenizerBase, messages: Messages, answer_next: bool = False) -> str | None:
    """The conversation in the teacher's own form; None where its template refuses it (a role, an order)."""
    if not tokenizer.chat_template:
        raise UserError("--data: it holds conversations, and the teacher has no chat template; give a chat teacher, or "
                        '--set data.messages_field="" to read the text field of the rows')
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer_next,
                                                 date_string=DAY))
    except jinja2.TemplateError:
        return None


def _encode_chats(tokenizer: PreTrainedTokenizerBase, chats: list[Messages]) -> Iterator[Encoded | None]:
    """Renders everything first, so that the tokenizer is called once."""
    rendered = [_renderings(tokenizer, messages) for messages in chats]
    texts = list(dict.fromkeys(text for one in rendered if one for text in _texts(*one)))
    rows: Any = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
    ids_of = dict(zip(texts, rows, strict=True))
    for renderings in rendered:
        yield None if renderings is None else _encoded_chat(ids_of, *renderings)


Answer = tuple[str, str] | None  # the text up to it (with the generation prompt), and up to its end


def _renderings(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> tuple[str, list[Answer]] | None:
    """The conversation and its answers; an answer that cannot be rendered alone is None."""
    whole = render(tokenizer, messages)
    if whole is None:
        return None
    answers: list[Answer] = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before = render(tokenizer, messages[:i], answer_next=True) if i else None  # templates refuse no messages
            after = render(tokenizer, messages[:i + 1])
            answers.append(None if before is None or after is None else (before, after))
    return whole, answers


def _texts(whole: str, answers: list[Answer]) -> Iterator[str]:
    yield whole
    for answer in answers:
        yield from answer or ()


def _encoded_chat(ids_of: dict[str, list[int]], whole: str, answers: list[Answer]) -> Encoded | None:
    """Marks each answer where the ids before it and up to its end really begin the conversation's ids.

    They need not: Qwen3's template shows the last answer's thinking only, so that earlier answers look different once
    another follows. Such an answer is left out of the loss, rather than guessed at.
    """
    ids = ids_of[whole]
    counts = np.zeros(len(ids), dtype=bool)
    n_missed = 0
    for answer in answers:
        before, after = (ids_of[text] for text in answer) if answer else ([], [-1])
        if ids[:len(after)] == after and ids[:len(before)] == before:
            counts[len(before):len(after)] = True
        else:
            n_missed += 1
    return Encoded(ids, counts, n_missed) if counts.any() else None
