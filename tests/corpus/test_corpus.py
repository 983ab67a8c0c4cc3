"""Texts from every kind of source, the split by hash, and sequences for verification."""
from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from lrc_edge.corpus.held_out import OVERLAP, Calibration, HeldOut, built_in_text, is_held_out
from lrc_edge.corpus.sources import LONGEST_PASSAGE, Document, Fields, documents
from lrc_edge.errors import UserError


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


def test_a_folder_that_datasets_wrote(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_list([{"text": f"Row {i}.", "id": i} for i in range(5)])
    for i in range(2):
        rows.shard(2, i).to_parquet(tmp_path / f"train-0000{i}-of-00002.parquet")
    assert texts(tmp_path) == [f"Row {i}." for i in range(5)]


def test_a_parquet_file_of_texts_that_are_not_utf8(tmp_path: Path) -> None:
    """Parquet does not check that strings are UTF-8."""
    offsets, data = pyarrow.py_buffer(bytes([0, 0, 0, 0, 2, 0, 0, 0])), pyarrow.py_buffer(b"a\xff")
    column = pyarrow.StringArray.from_buffers(1, offsets, data)
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="not a readable parquet file"):
        texts(tmp_path / "a.parquet")


def test_a_parquet_file_that_is_cut(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": [f"{i} " * 100 for i in range(2000)]}), file)
    content = bytearray(file.read_bytes())
    content[100:2000] = bytes(1900)  # the footer is whole, the pages are not
    file.write_bytes(content)
    with pytest.raises(UserError, match="not a readable parquet"):
        texts(file)


@pytest.mark.parametrize(("source", "asked"), [
    ("org/name", ("org/name", None, "train")), ("name:sample-10BT", ("name", "sample-10BT", "train")),
    ("org/name:v1.0:test", ("org/name", "v1.0", "test")), ("org/name::validation", ("org/name", None, "validation")),
])
def test_a_hub_dataset_is_streamed(source: str, asked: tuple[str, str | None, str],
                                   monkeypatch: pytest.MonkeyPatch) -> None:
    """A real streaming dataset; only the download is simulated."""
    def load(name: str, config: str | None, *, split: str, streaming: bool) -> datasets.IterableDataset:
        assert (name, config, split) == asked and streaming
        return datasets.IterableDataset.from_generator(lambda: iter([{"text": "One."}, {"text": "Two."}]))

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert texts(source) == ["One.", "Two."]


def test_a_hub_that_refuses_and_one_that_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows(*_: Any, **__: Any) -> Iterator[dict[str, str]]:
        yield {"text": "One."}
        raise ConnectionError("reset by peer")

    monkeypatch.setattr(datasets, "load_dataset", rows)
    with pytest.raises(UserError, match=r"org/name: the hub failed after row 1 \(reset by peer\)"):
        texts("org/name")

    def refuse(*_: Any, **__: Any) -> None:
        raise ValueError("Bad split: x")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(UserError, match=r"the hub has no such dataset \(Bad split: x\)"):
        texts("org/name:default:x")


def test_self_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="works only with `build` and `train`, which have a teacher"):
        texts("self")


def test_split_is_by_content_and_near_its_share() -> None:
    names = [f"document {i}" for i in range(5000)]
    held = {name for name in names if is_held_out(name, 0.1)}
    assert 400 < len(held) < 600
    assert held == {name for name in reversed(names) if is_held_out(name, 0.1)}
    assert held <= {name for name in names if is_held_out(name, 0.2)}


def test_rows_for_verification() -> None:
    held_out = HeldOut(np.arange(1000), 2000, ())
    rows = held_out.rows(100, 300, bos=7)
    assert rows.shape == (4, 100) and (rows[:, 0] == 7).all() and rows[1, 1] == 99  # 4 * 99 >= 300 predictions
    assert held_out.rows(100, 10**6, bos=None).shape == (10, 100)  # no more than there is
    with pytest.raises(UserError, match="need at least"):
        held_out.rows(2000, 10, bos=None)
    with pytest.raises(UserError, match="3 tokens in sequences of 1, need at least 2"):
        HeldOut(np.arange(3), 9, ()).rows(1, 10, bos=None)


def test_built_in_text_is_enough_for_the_proof() -> None:
    assert sum(map(len, built_in_text())) > 200_000


def test_calibration_rows_share_nothing_with_the_evaluation() -> None:
    rng = np.random.default_rng(0)
    evaluation = rng.integers(0, 500, 4000)
    rows = [rng.integers(0, 500, 64) for _ in range(8)]
    rows[1][:OVERLAP] = evaluation[100:100 + OVERLAP]  # whole windows: at the beginning, the end, and the last one
    rows[4][-OVERLAP:] = evaluation[-OVERLAP:]
    rows[6] = evaluation[7:71]
    rows[5][3:3 + OVERLAP - 1] = evaluation[200:200 + OVERLAP - 1]  # one token short of a window
    got = Calibration.choose(iter(rows), (5, 64), evaluation, "training text")
    np.testing.assert_array_equal(got.rows, np.stack([rows[i] for i in (0, 2, 3, 5, 7)]))
    assert got.as_dict() == {"source": "training text", "sha256": got.sha256, "rows": 5, "tokens": 320,
                             "rows_left_out": 3}
    assert Calibration.choose(iter(rows), (2, 64), evaluation, "").n_left_out == 1  # enough is enough
    assert got.sha256 == hashlib.sha256(np.stack(got.rows).astype("<i8").tobytes()).hexdigest()
    assert got.sha256 != Calibration.choose(iter(rows), (4, 64), evaluation, "").sha256


def test_short_rows_are_compared_whole_and_none_left_is_an_error() -> None:
    evaluation = np.arange(100)
    got = Calibration.choose([np.arange(20, 30), np.arange(120, 130)], (2, 10), evaluation, "")
    assert got.rows.tolist() == [list(range(120, 130))] and got.n_left_out == 1
    with pytest.raises(UserError, match="all 2 sequences overlap it"):
        Calibration.choose([np.arange(50), np.arange(50, 100)], (2, 50), evaluation, "")
    with pytest.raises(UserError, match=r"too little text .* \(fewer than 50 tokens\); add --data"):
        Calibration.choose([], (2, 50), evaluation, "")
