"""Texts from every kind of source; the split by hash; rows for the proof."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from tiny_models import make_tokenizer

from lrc_edge.corpus import HeldOut, built_in_text, documents, is_held_out, token_ids
from lrc_edge.errors import UserError
from lrc_edge.train.data import PackedRows, prepare


def texts(*sources: Path | str) -> list[str]:
    return list(documents([str(s) for s in sources], "text"))


def test_every_kind_of_file_and_a_folder_of_them(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("One.\n\nTwo.")
    (folder / "b.jsonl").write_text('{"text": "Three."}\n\n{"text": "Four é."}\n')
    pyarrow.parquet.write_table(pyarrow.table({"text": ["Five.", "Six."]}), folder / "c.parquet")
    (folder / "ignored.csv").write_text("x")
    assert texts(folder) == ["One.\n\nTwo.", "Three.", "Four é.", "Five.", "Six."]
    assert texts(folder / "c.parquet", folder / "a.txt") == ["Five.", "Six.", "One.\n\nTwo."]


def test_a_book_is_cut_at_blank_lines(tmp_path: Path) -> None:
    paragraphs = [f"{i} " + "word " * 300 for i in range(20)]
    (tmp_path / "book.txt").write_text("\n\n".join(paragraphs))
    found = texts(tmp_path / "book.txt")
    assert len(found) > 3
    assert "\n\n".join(found) == "\n\n".join(paragraphs)


@pytest.mark.parametrize(("name", "content", "message"), [
    ("a.jsonl", '{"text": "x"}\n{"text"\n', r"a.jsonl:2: not JSON"),
    ("a.jsonl", '{"body": "x"}\n', r"no text field 'text' \(has body\)"),
    ("a.jsonl", "[1]\n", r"no text field 'text' \(is a list\)"),
    ("a.parquet", "not parquet", "not a readable parquet"),
    ("a.csv", "x", "unknown kind of text file"),
])
def test_broken_sources(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        texts(tmp_path / name)


def test_missing_and_binary_sources(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        texts(tmp_path / "missing.txt")
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        texts(tmp_path / "a.txt")
    with pytest.raises(UserError, match=r"no \.txt"):
        (tmp_path / "empty").mkdir()
        texts(tmp_path / "empty")


def test_parquet_without_the_column(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"content": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"no column 'text' \(has content\)"):
        texts(tmp_path / "a.parquet")


def test_split_is_by_content_and_near_its_share() -> None:
    names = [f"document {i}" for i in range(5000)]
    held = {name for name in names if is_held_out(name, 0.1)}
    assert 400 < len(held) < 600
    assert held == {name for name in reversed(names) if is_held_out(name, 0.1)}
    assert held <= {name for name in names if is_held_out(name, 0.2)}


def test_prepare_packs_every_token_once_and_holds_out_the_rest(tmp_path: Path) -> None:
    tokenizer = make_tokenizer("llama3")
    docs = [f"Document number {i} says hello." for i in range(300)]
    n = prepare(iter(docs), tokenizer, tmp_path, held_out_share=0.1, max_tokens=10**9, seq_len=16,
                progress=lambda n: None)
    kept = [d for d in docs if not is_held_out(d, 0.1)]
    expected = [i for row in token_ids(tokenizer, kept) for i in row]
    assert np.load(tmp_path / "tokens.npy").tolist() == expected and n == len(expected)
    rows = PackedRows(tmp_path / "tokens.npy", 16)
    assert rows[1]["input_ids"].tolist() == expected[16:32] and len(rows) == n // 16
    held_out = HeldOut.load(tmp_path / "held_out.npz")
    text = tokenizer.decode(held_out.ids, skip_special_tokens=True)
    assert text == "".join(d for d in docs if is_held_out(d, 0.1)) and held_out.n_bytes == len(text)
    assert not (tmp_path / "tokens.bin").exists()


@pytest.mark.parametrize(("docs", "message"), [
    ([], "no text in it"), (["", "  \n"], "no text in it"), (["Hi."] * 3, "need at least train.seq_len = 64"),
    (["A long enough document, again and again. " * 30], "none held out"),
])
def test_empty_or_too_short_data(docs: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        prepare(iter(docs), make_tokenizer("llama3"), tmp_path, held_out_share=1e-9, max_tokens=10**9, seq_len=64,
                progress=lambda n: None)


def test_rows_for_the_proof() -> None:
    held_out = HeldOut(np.arange(1000), 2000, ())
    rows = held_out.rows(100, 300, bos=7)
    assert rows.shape == (4, 100) and (rows[:, 0] == 7).all() and rows[1, 1] == 99  # 4 * 99 >= 300 predictions
    assert held_out.rows(100, 10**6, bos=None).shape == (10, 100)  # no more than there is
    with pytest.raises(UserError, match="need at least"):
        held_out.rows(2000, 10, bos=None)


def test_built_in_text_is_enough_for_the_proof() -> None:
    assert sum(map(len, built_in_text())) > 200_000
