"""Encode documents as token ids: plain text directly, conversations through the teacher's chat template."""
from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import jinja2
import numpy as np

from lrc_edge.corpus.sources import Document, Messages
from lrc_edge.errors import UserError

if TYPE_CHECKING:
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase


# Llama 3's template writes today's date into every conversation, but tokens must not depend on the day they were made.
# This is the template's own default.
DAY = "26 Jul 2024"


class Encoded(NamedTuple):
    """A document as token ids. `counts` marks the ids that the loss covers; None: all, as in plain text."""

    ids: list[int]
    counts: np.ndarray | None = None  # (len(ids),) bool
    n_missed: int = 0  # answers left out of the loss because their ids could not be identified


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Return each text's ids as the tokenizer makes them (with BOS if it adds one), then EOS."""
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return [ids + eos for ids in tokenizer(texts, verbose=False)["input_ids"]] if texts else []


def encode(tokenizer: PreTrainedTokenizerBase, documents: list[Document], all_tokens: bool = False
           ) -> list[Encoded | None]:
    """Return each document as ids; None for a conversation that the template refuses or that has no answer to learn.

    `all_tokens`: the loss covers every token of a conversation, as of a text, not the answers only.
    """
    texts = iter(token_ids(tokenizer, [d for d in documents if isinstance(d, str)]))
    of_chats = _encode_complete_chats if all_tokens else _encode_chats
    chats = iter(of_chats(tokenizer, [d for d in documents if not isinstance(d, str)]))
    return [Encoded(next(texts)) if isinstance(d, str) else next(chats) for d in documents]


def render(tokenizer: PreTrainedTokenizerBase, messages: Messages, answer_next: bool = False) -> str | None:
    """Render the conversation with the teacher's template; None if the template refuses it (a role, an order)."""
    if not tokenizer.chat_template:
        raise UserError("--data contains conversations, but the teacher has no chat template; use a chat teacher, or "
                        'read the text field instead with --set data.messages_field=""')
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer_next,
                                                 date_string=DAY))
    except jinja2.TemplateError:
        return None


def _encode_complete_chats(tokenizer: PreTrainedTokenizerBase, chats: list[Messages]) -> Iterator[Encoded | None]:
    rendered = [render(tokenizer, messages) for messages in chats]
    texts = [text for text in rendered if text is not None]
    rows: Any = iter(tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else [])
    for text in rendered:
        yield None if text is None else Encoded(next(rows))


def _encode_chats(tokenizer: PreTrainedTokenizerBase, chats: list[Messages]) -> Iterator[Encoded | None]:
    """Encode the conversations. Everything is rendered first, so that the tokenizer is called once."""
    rendered = [_renderings(tokenizer, messages) for messages in chats]
    texts = list(dict.fromkeys(text for one in rendered if one for text in _texts(*one)))
    rows: Any = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
    ids_of = dict(zip(texts, rows, strict=True))
    for renderings in rendered:
        yield None if renderings is None else _encoded_chat(ids_of, *renderings)


Answer = tuple[str, str] | None  # the text before the answer (with the generation prompt), and up to its end


def _renderings(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> tuple[str, list[Answer]] | None:
    """Render the conversation and its answers; an answer is None if the template refuses the text around it."""
    conversation = render(tokenizer, messages)
    if conversation is None:
        return None
    answers: list[Answer] = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before = render(tokenizer, messages[:i], answer_next=True) if i else None  # templates refuse an empty list
            after = render(tokenizer, messages[:i + 1])
            answers.append(None if before is None or after is None else (before, after))
    return conversation, answers


def _texts(conversation: str, answers: list[Answer]) -> Iterator[str]:
    yield conversation
    for answer in answers:
        yield from answer or ()


def _encoded_chat(ids_of: dict[str, list[int]], conversation: str, answers: list[Answer]) -> Encoded | None:
    """Mark each answer whose ids, with all ids before it, are a prefix of the conversation's ids.

    Not every answer is: Qwen3's template shows only the last answer's thinking, so earlier answers are rendered
    differently once another follows. Such an answer is left out of the loss.
    """
    ids = ids_of[conversation]
    counts = np.zeros(len(ids), dtype=bool)
    n_missed = 0
    for answer in answers:
        before, after = (ids_of[text] for text in answer) if answer else ([], [-1])
        if ids[:len(after)] == after and ids[:len(before)] == before:
            counts[len(before):len(after)] = True
        else:
            n_missed += 1
    return Encoded(ids, counts, n_missed) if counts.any() else None
