"""Conversations: their forms, the loss on the answers alone, what is skipped and what is refused."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from tiny_models import make_tokenizer

from lrc_edge.corpus.encode import encode, render
from lrc_edge.corpus.held_out import HeldOut, is_held_out
from lrc_edge.corpus.sources import Document, Fields, Messages, source_documents
from lrc_edge.errors import UserError
from lrc_edge.train.data.tokenize import PackedRows, describe, prepare, read_summary

CHAT: Messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello there?"},
                  {"role": "assistant", "content": "Hi."}, {"role": "user", "content": "Who are you?"},
                  {"role": "assistant", "content": "A model, of course."}]
SHAREGPT = [{"from": {"system": "system", "user": "human", "assistant": "gpt"}[m["role"]], "value": m["content"]}
            for m in CHAT]
LLAMA3_HEADER = "<|start_header_id|>assistant<|end_header_id|>\n\n"
# As Qwen3's: the last answer shows its (empty) thinking, the earlier ones do not.
THINKING_TEMPLATE = (
    "{%- for message in messages %}{{- '<|im_start|>' + message['role'] + '\n' }}"
    "{%- if loop.last and message['role'] == 'assistant' %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{{- message['content'] + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}")
REFUSING_TEMPLATE = (
    "{%- for message in messages %}{%- if message['role'] == 'system' %}{{- raise_exception('no system') }}{%- endif %}"
    "{{- '<|im_start|>' + message['content'] + '<|im_end|>' }}{%- endfor %}")


def write(file: Path, *rows: Any) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def learnt_by_walking(ids: list[int], tokenizer: Any, header: str, end: str) -> list[bool]:
    """An independent method: from after each assistant header to its end token, found in the ids."""
    start: list[int] = tokenizer(header, add_special_tokens=False)["input_ids"]
    stop = tokenizer.convert_tokens_to_ids(end)
    inside, learnt = False, []
    for i, token in enumerate(ids):
        inside = inside or ids[max(0, i - len(start)):i] == start
        learnt.append(inside)
        inside = inside and token != stop
    return learnt


def test_the_loss_looks_at_the_answers_alone() -> None:
    tokenizer = make_tokenizer("llama3")
    encoded, = encode(tokenizer, [CHAT])
    assert encoded is not None and encoded.counts is not None and encoded.n_missed == 0
    assert encoded.ids == tokenizer.apply_chat_template(CHAT, tokenize=True, return_dict=False)
    walked = learnt_by_walking(encoded.ids, tokenizer, LLAMA3_HEADER, "<|eot_id|>")
    assert encoded.counts.tolist() == walked
    learnt = tokenizer.decode([i for i, counts in zip(encoded.ids, encoded.counts, strict=True) if counts])
    assert learnt == "Hi.<|eot_id|>A model, of course.<|eot_id|>"


def test_chatml_learns_the_line_end_behind_an_answer_too() -> None:
    tokenizer = make_tokenizer("qwen2")
    encoded, = encode(tokenizer, [CHAT])
    assert encoded is not None and encoded.counts is not None
    learnt = [i for i, counts in zip(encoded.ids, encoded.counts, strict=True) if counts]
    assert tokenizer.decode(learnt) == "Hi.<|im_end|>\nA model, of course.<|im_end|>\n"
    walked = learnt_by_walking(encoded.ids, tokenizer, "<|im_start|>assistant\n", "<|im_end|>")
    assert sum(walked) == len(learnt) - 2, "all but the two line ends"


def test_an_answer_that_changes_when_another_follows_is_left_out() -> None:
    tokenizer = make_tokenizer("qwen2")
    tokenizer.chat_template = THINKING_TEMPLATE
    encoded, = encode(tokenizer, [CHAT])
    assert encoded is not None and encoded.counts is not None and encoded.n_missed == 1
    learnt = tokenizer.decode([i for i, counts in zip(encoded.ids, encoded.counts, strict=True) if counts])
    assert learnt == "<think>\n\n</think>\n\nA model, of course.<|im_end|>\n"


@pytest.mark.parametrize("kind", ["llama3", "qwen2"])
def test_the_loss_may_cover_every_token_of_a_conversation(kind: str) -> None:
    """Also of one without an answer; one that the template refuses is still left out."""
    tokenizer = make_tokenizer(kind)
    encoded, text, question = encode(tokenizer, [CHAT, "Plain.", CHAT[:2]], all_tokens=True)
    assert encoded is not None and question is not None and text == encode(tokenizer, ["Plain."])[0]
    assert encoded.ids == tokenizer.apply_chat_template(CHAT, tokenize=True, return_dict=False)
    assert question.ids == tokenizer.apply_chat_template(CHAT[:2], tokenize=True, return_dict=False)
    assert encoded.counts is None and question.counts is None and encoded.n_missed == 0
    tokenizer.chat_template = REFUSING_TEMPLATE
    assert [one is None for one in encode(tokenizer, [CHAT, CHAT[1:]], all_tokens=True)] == [True, False]


def test_labels_of_conversations_that_are_learned_completely(tmp_path: Path) -> None:
    tokenizer = make_tokenizer("llama3")
    documents: list[Document] = [[*CHAT[:4], {"role": "assistant", "content": f"Answer {i}."}] for i in range(30)]
    n = prepare([("chats", documents)], tokenizer, tmp_path, held_out_share=0.1, max_tokens=None, seq_len=50,
                progress=lambda n: None, all_tokens=True)
    rows = PackedRows(tmp_path, n)
    assert rows[0]["labels"].tolist() == [*rows[0]["input_ids"].tolist()[1:], -100]
    assert not list(tmp_path.glob("loss-*"))


def test_tokens_do_not_depend_on_the_day() -> None:
    tokenizer = make_tokenizer("llama3")
    tokenizer.chat_template = ("{%- if not date_string is defined %}{%- set date_string = strftime_now('%d %b %Y') %}"
                               "{%- endif %}{{- date_string }}" + str(tokenizer.chat_template))
    assert str(render(tokenizer, CHAT)).startswith("26 Jul 2024<|begin")


@pytest.mark.parametrize("chat", [CHAT[:2], CHAT[2:3], [{"role": "user", "content": ""}]])
def test_a_conversation_without_an_answer_to_learn_is_none(chat: Messages) -> None:
    assert encode(make_tokenizer("llama3"), [chat, "text"])[0] is None


def test_labels_of_texts_and_chats_in_one_stream(tmp_path: Path) -> None:
    """Independent of the packing: each document is encoded alone, and the labels are concatenated."""
    tokenizer = make_tokenizer("llama3")
    documents: list[Document] = []
    for i in range(60):
        documents += [f"Plain text number {i}.", [*CHAT[:4], {"role": "assistant", "content": f"Answer {i}."}]]
    n = prepare([("mixed", documents)], tokenizer, tmp_path, held_out_share=0.1, max_tokens=None, seq_len=50,
                progress=lambda n: None, shard_tokens=100)
    ids: list[int] = []
    learnt: list[bool] = []
    for document in documents:
        if not is_held_out(document, 0.1):
            text = isinstance(document, str)
            mine = (tokenizer(document)["input_ids"] + [tokenizer.eos_token_id] if text
                    else tokenizer.apply_chat_template(document, return_dict=False))
            ids += mine
            learnt += [True] * len(mine) if text else learnt_by_walking(mine, tokenizer, LLAMA3_HEADER, "<|eot_id|>")
    assert n == len(ids)
    rows = PackedRows(tmp_path, 50)
    for k in range(len(rows)):
        a, b = 50 * k, 50 * k + 50
        assert rows[k]["input_ids"].tolist() == ids[a:b]
        assert rows[k]["labels"].tolist() == [i if counts else -100 for i, counts in
                                              zip(ids[a + 1:b], learnt[a + 1:b], strict=True)] + [-100]
    held_out = [d for d in documents if is_held_out(d, 0.1)]
    assert {type(d) for d in held_out} == {str, list}
    openings = HeldOut.load(tmp_path / "held_out.npz").openings
    assert not any("<|" in opening for opening in openings)


def test_every_form_and_mixed_rows(tmp_path: Path) -> None:
    rows = [{"messages": CHAT}, {"text": "Plain."}, {"conversations": SHAREGPT}, {"messages": None, "text": "Null."},
            {"messages": SHAREGPT, "text": "not this"}, {"messages": None}]
    expected = [CHAT, "Plain.", CHAT, "Null.", CHAT]
    assert list(source_documents(write(tmp_path / "a.jsonl", *rows), Fields())) == expected
    chats = {"messages": [CHAT, None, CHAT], "text": [None, "Plain.", None], "unused": [1, 2, 3]}
    pyarrow.parquet.write_table(pyarrow.table(chats), tmp_path / "b.parquet")
    assert list(source_documents(str(tmp_path / "b.parquet"), Fields())) == [CHAT, "Plain.", CHAT]
    other = write(tmp_path / "c.jsonl", {"dialog": CHAT, "text": "not this"})
    assert list(source_documents(other, Fields(messages="dialog"))) == [CHAT]
    assert list(source_documents(other, Fields(messages=""))) == ["not this"]


@pytest.mark.parametrize(("row", "message"), [
    ({"messages": []}, r"a.jsonl:1: messages is an empty conversation"),
    ({"messages": "Hello"}, r"messages is a str, need a list of \{role, content\}"),
    ({"messages": ["Hello"]}, r"messages\[0\] is a str, need \{role, content\}"),
    ({"messages": [*CHAT, {"role": "user"}]}, r"messages\[5\] has role 'user' and a NoneType as content"),
    ({"messages": [{"role": 3, "content": "x"}]}, "has role 3"),
    ({"conversations": [{"from": "narrator", "value": "x"}]}, r"conversations\[0\] is from 'narrator', need one of"),
    ({"conversations": [{"from": "human", "value": 3}]}, "a int as content"),
])
def test_messages_of_a_wrong_shape(row: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        list(source_documents(write(tmp_path / "a.jsonl", row), Fields()))


def test_a_teacher_without_a_chat_template(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the teacher has no chat template; .*data.messages_field"):
        encode(make_tokenizer("gpt2"), ["Plain.", CHAT])
    with pytest.raises(UserError, match="no chat template"):
        HeldOut.from_texts([CHAT], make_tokenizer("gpt2"))


def test_refused_conversations_are_counted_and_told(tmp_path: Path) -> None:
    tokenizer = make_tokenizer("qwen2")
    tokenizer.chat_template = REFUSING_TEMPLATE
    settings: dict[str, Any] = {"held_out_share": 0.2, "max_tokens": None, "seq_len": 16, "progress": lambda n: None}
    prepare([("a", [CHAT, *(f"Text number {i}" for i in range(40))])], tokenizer, tmp_path, **settings)
    tally, = read_summary(tmp_path)
    assert tally.skipped_conversations == 1 and describe([tally]) == "skipped conversations: 1"
    with pytest.raises(UserError, match="refuses all 3 conversations"):
        prepare([("a", [CHAT] * 3)], tokenizer, tmp_path, **{**settings, "held_out_share": 1e-9})
