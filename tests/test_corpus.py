"""Texts from every kind of source; the split by hash; rows for the proof."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from lrc_edge.corpus import HeldOut, built_in_text, is_held_out
from lrc_edge.errors import UserError
from lrc_edge.sources import LONGEST_PASSAGE, Document, Fields, documents


def texts(*sources: Path | str) -> list[Document]:
    return list(documents([str(s) for s in sources], Fields()))


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
    assert all(isinstance(text, str) for text in found)
    assert "\n\n".join(map(str, found)) == "\n\n".join(paragraphs)


def test_a_text_without_blank_lines_is_cut_at_lines_and_one_without_lines_anywhere(tmp_path: Path) -> None:
    lines = "".join(f"{i} " + "word " * 300 + "\n" for i in range(200))
    (tmp_path / "log.txt").write_text(lines)
    found = [str(text) for text in texts(tmp_path / "log.txt")]
    assert len(found) > 3 and "\n".join(found) == lines and all(len(text) < 2 * LONGEST_PASSAGE for text in found)
    (tmp_path / "line.txt").write_text("x" * (3 * LONGEST_PASSAGE + 5))
    assert [len(text) for text in texts(tmp_path / "line.txt")] == [LONGEST_PASSAGE] * 3 + [5]


@pytest.mark.parametrize(("name", "content", "message"), [
    ("a.jsonl", '{"text": "x"}\n{"text"\n', r"a.jsonl:2: not JSON"),
    ("a.jsonl", '{"body": "x"}\n', r"no text field 'text' or messages field 'messages' \(has body\)"),
    ("a.jsonl", "[1]\n", r"no text field 'text' .*\(is a list\)"),
    ("a.jsonl", '{"text": 3}\n', r"a.jsonl:1: text is int, need text"),
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
    with pytest.raises(UserError, match=r"no text field 'text' .*among its columns \(content\)"):
        texts(tmp_path / "a.parquet")


def test_split_is_by_content_and_near_its_share() -> None:
    names = [f"document {i}" for i in range(5000)]
    held = {name for name in names if is_held_out(name, 0.1)}
    assert 400 < len(held) < 600
    assert held == {name for name in reversed(names) if is_held_out(name, 0.1)}
    assert held <= {name for name in names if is_held_out(name, 0.2)}


def test_rows_for_the_proof() -> None:
    held_out = HeldOut(np.arange(1000), 2000, ())
    rows = held_out.rows(100, 300, bos=7)
    assert rows.shape == (4, 100) and (rows[:, 0] == 7).all() and rows[1, 1] == 99  # 4 * 99 >= 300 predictions
    assert held_out.rows(100, 10**6, bos=None).shape == (10, 100)  # no more than there is
    with pytest.raises(UserError, match="need at least"):
        held_out.rows(2000, 10, bos=None)


def test_built_in_text_is_enough_for_the_proof() -> None:
    assert sum(map(len, built_in_text())) > 200_000
